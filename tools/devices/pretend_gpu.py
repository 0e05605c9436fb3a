"""A GPU that is none: PyTorch's PrivateUse1 backend with the host's memory (pretend_gpu.cpp)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import types
from pathlib import Path

import torch

#: The name of the device.
DEVICE = 'pgpu'


def missing() -> str | None:
    """What this machine lacks to compile the backend; ``None`` where it lacks nothing."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    if shutil.which(get_cxx_compiler()) is None:
        return f'no C++ compiler ({get_cxx_compiler()}; CXX names another)'
    return None if is_ninja_available() else 'no ninja'


def load() -> None:
    """Compiles the backend where that has not been done (20 s), and makes its device known.

    It is kept beside PyTorch's own extensions (``TORCH_EXTENSIONS_DIR``), one for each version. No
    lock is left behind by a compilation that was ended.
    """
    from torch.utils import cpp_extension

    source = Path(__file__).with_suffix('.cpp')
    text = torch.__version__.encode() + source.read_bytes()
    name = f'pretend_gpu_{hashlib.sha256(text).hexdigest()[:16]}'
    folder = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or cpp_extension.get_default_build_root())
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f'{name}.so'
    if library.exists():
        torch.ops.load_library(library)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as build:
            cpp_extension.load(
                name,
                [str(source)],
                extra_cflags=['-O0', '-w'],
                build_directory=build,
                is_python_module=False,
            )
            os.replace(Path(build, library.name), library)
    torch.utils.rename_privateuse1_backend(DEVICE)
    module = types.ModuleType(f'torch.{DEVICE}')
    module.is_available = lambda: True
    module.current_device = lambda: 0
    module.device_count = lambda: 1
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.device = lambda index: contextlib.nullcontext()
    torch._register_device_module(DEVICE, module)
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
