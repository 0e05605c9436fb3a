// Draws regions, sends questions, shows answers. Texts only ever become text nodes.

const find = (id) => document.getElementById(id);
const canvas = find('canvas');
const shown = find('shown');

/** The photograph that is shown: {image, width, height}. */
let photograph = null;
/** What is drawn on it: pairs of x and y in its pixels, and for points their labels. */
let points = [];
let labels = [];
let drawing = false;

const kind = () => document.querySelector('input[name=kind]:checked').value;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function complain(message) {
  find('error').textContent = message;
  find('error').hidden = !message;
}

/** Sends a body, and returns what the answer says; complaints of the server are errors. */
async function send(path, type, body) {
  let answer;
  try {
    answer = await fetch(path, { method: 'POST', headers: { 'Content-Type': type }, body });
  } catch {
    throw new Error('the server does not answer: is tools/app.py still running?');
  }
  let said;
  try {
    said = await answer.json();
  } catch {
    throw new Error(`the server answered ${answer.status} without a reason: see its terminal`);
  }
  if (!answer.ok) throw new Error(said.error);
  return said;
}

const ask = (path, question) => send(path, 'application/json', JSON.stringify(question));

/** Runs a task, with the buttons off and its errors on the page. */
async function busy(what, task) {
  complain('');
  find('status').textContent = what;
  document.body.setAttribute('aria-busy', 'true');
  refresh();
  try {
    await task();
  } catch (error) {
    complain(error.message);
  }
  find('status').textContent = '';
  document.body.removeAttribute('aria-busy');
  refresh();
}

function refresh() {
  const waiting = document.body.hasAttribute('aria-busy');
  find('describe').disabled = waiting || !points.length;
  find('segment').disabled = waiting;
  find('beside-label').hidden = kind() !== 'points';
  draw();
}

// ------------------------------------------------------------------ photograph

async function load(file) {
  await busy(`Reading ${file.name} …`, async () => {
    let read;
    try {
      read = await send('/api/images', 'application/octet-stream', file);
    } catch (error) {
      throw new Error(`${file.name}: ${error.message}`);
    }
    photograph = read;
    clear();
    find('answers').replaceChildren();
    shown.src = `/api/images/${read.image}`;
    canvas.width = read.width;
    canvas.height = read.height;
    find('photograph').hidden = false;
    await shown.decode();
  });
}

find('file').addEventListener('change', (event) => {
  const [file] = event.target.files;
  event.target.value = ''; // so that the same file can be chosen again
  if (file) load(file);
});
document.addEventListener('dragover', (event) => event.preventDefault());
document.addEventListener('drop', (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) load(file);
});

// --------------------------------------------------------------------- drawing

function clear() {
  points = [];
  labels = [];
  drawing = false;
  refresh();
}

function position(event) {
  const box = canvas.getBoundingClientRect();
  const inside = (value, most) => Math.min(Math.max(value, 0), most);
  return [
    inside(((event.clientX - box.left) / box.width) * canvas.width, canvas.width),
    inside(((event.clientY - box.top) / box.height) * canvas.height, canvas.height),
  ];
}

canvas.addEventListener('pointerdown', (event) => {
  if (event.button !== 0) return;
  if (kind() === 'points') {
    points.push(position(event));
    labels.push(event.shiftKey || find('beside').checked ? 0 : 1);
  } else {
    canvas.setPointerCapture(event.pointerId);
    points = [position(event)];
    drawing = true;
  }
  refresh();
});
canvas.addEventListener('pointermove', (event) => {
  if (!drawing) return;
  if (kind() === 'box') points = [points[0], position(event)];
  else points.push(position(event));
  draw();
});
for (const name of ['pointerup', 'pointercancel']) {
  canvas.addEventListener(name, () => {
    drawing = false;
    refresh();
  });
}
find('clear').addEventListener('click', clear);
for (const input of document.querySelectorAll('input[name=kind]')) {
  input.addEventListener('change', clear);
}

function draw() {
  const pen = canvas.getContext('2d');
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!points.length) return;
  const width = Math.max(canvas.width, canvas.height) / 250;
  pen.lineWidth = width;
  pen.strokeStyle = '#ffd400';
  pen.fillStyle = 'rgb(255 212 0 / 35%)';
  if (kind() === 'points') {
    points.forEach(([x, y], index) => {
      pen.beginPath();
      pen.arc(x, y, 2.5 * width, 0, 2 * Math.PI);
      pen.fillStyle = labels[index] ? '#ffd400' : '#e03030';
      pen.fill();
    });
    return;
  }
  pen.beginPath();
  if (kind() === 'box') {
    const [[left, top], [right, bottom]] = [points[0], points.at(-1)];
    pen.rect(left, top, right - left, bottom - top);
  } else {
    points.forEach(([x, y]) => pen.lineTo(x, y));
    if (kind() === 'outline' && !drawing) pen.closePath();
  }
  if (kind() === 'outline' && !drawing) pen.fill();
  pen.stroke();
}

// --------------------------------------------------------------------- answers

function picture(...layers) {
  const frame = make('div', { className: 'picture' });
  frame.append(make('img', { src: shown.src, alt: '' }));
  for (const [source, what] of layers) {
    if (source) frame.append(make('img', { className: 'layer', src: source, alt: what }));
  }
  return frame;
}

function score(name, value) {
  const meter = make('meter', { min: 0, max: 1, value });
  meter.setAttribute('aria-label', name);
  return make('p', { className: 'score' }, `${name} ${value.toFixed(3)}`, meter);
}

function article(title, cards) {
  const grid = make('div', { className: 'cards' }, ...cards);
  find('answers').prepend(make('article', {}, make('h2', {}, title), grid));
}

const nameOf = (one, index, all) =>
  all.length > 1 ? `${['base', 'trained'][index]}: ${one.model}` : one.model;

const took = (answer) => make('p', { className: 'hint' }, `${answer.seconds.toFixed(1)} s`);

find('describe').addEventListener('click', () =>
  busy('Describing …', async () => {
    const region = { kind: kind(), points, labels };
    const said = await ask('/api/describe', { image: photograph.image, region });
    const cards = said.answers.map((one, index, all) =>
      make(
        'div',
        { className: 'card' },
        make('h3', {}, nameOf(one, index, all)),
        picture([said.region, 'the region'], [one.mask, 'what came back']),
        make('p', { className: 'caption' }, one.caption || 'It said nothing.'),
        score('IoU', one.iou),
        make('p', { className: 'hint' }, one.found ? 'Yellow: the region. Blue: what the model finds for its own words.' : 'It finds nothing for its own words.'),
        took(one),
      ),
    );
    article('Mask → caption → mask′', cards);
  }),
);

find('form').addEventListener('submit', (event) => {
  event.preventDefault();
  busy('Segmenting …', async () => {
    const text = find('text').value;
    const said = await ask('/api/segment', { image: photograph.image, text });
    const cards = said.answers.map((one, index, all) =>
      make(
        'div',
        { className: 'card' },
        make('h3', {}, nameOf(one, index, all)),
        picture([one.found ? one.mask : null, 'what was found']),
        make('p', { className: 'answer' }, one.found ? `It said: ${one.answer}` : `It found nothing. It said: ${one.answer}`),
        make('p', { className: 'caption' }, one.caption ?? ''),
        score('METEOR', one.meteor),
        make('p', { className: 'hint' }, one.found ? 'METEOR of its caption of that mask against your text.' : 'No mask, no caption.'),
        took(one),
      ),
    );
    article(`Text → mask → caption′: “${text}”`, cards);
  });
});

fetch('/api/models')
  .then((answer) => answer.json())
  .then(({ models }) => {
    const named = models.map((model, index, all) => nameOf({ model }, index, all));
    find('models').textContent = named.join(' · ');
  });
