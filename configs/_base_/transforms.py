# Records to tensors. Sizes are the model's: they are filled in when a run builds its data.
from projects.llava_sam2_rl.datasets import Sa2VATransform

transform = dict(type=Sa2VATransform, max_dynamic_patch=1)
# As the official evaluation: up to 12 tiles and the whole image.
test_transform = dict(type=Sa2VATransform, max_dynamic_patch=12)
