// Drawing: freehand strokes and shapes that are pulled up, with undo. The picture is a list of marks.

const PAPER = '#ffffff';
const UNDO = 200;

/** The colours that the miniature has words for. */
const COLOURS = {
  red: '#d92626',
  orange: '#f58a1f',
  yellow: '#f2cf1d',
  green: '#2fa84f',
  blue: '#2b62d9',
  purple: '#8a3fc2',
  pink: '#f48fb8',
  brown: '#8a5a33',
  black: '#161616',
  white: '#ffffff',
  grey: '#8c8c8c',
};

/** @param {number} degrees clockwise from the top */
const polar = (radius, degrees) => {
  const angle = (degrees * Math.PI) / 180;
  return [radius * Math.sin(angle), -radius * Math.cos(angle)];
};
const around = (count, make) => Array.from({ length: count }, (_, i) => make(i, (360 / count) * i));

/** Outlines around 0, within 1. */
const SHAPES = {
  circle: around(48, (_, degrees) => polar(1, degrees)),
  square: around(4, (_, degrees) => polar(1.2, degrees + 45)),
  triangle: around(3, (_, degrees) => polar(1, degrees)),
  star: around(10, (i, degrees) => polar(i % 2 ? 0.4 : 1, degrees)),
  heart: around(48, (_, degrees) => {
    const cos = (times) => Math.cos((times * degrees * Math.PI) / 180);
    return [polar(1, degrees)[0] ** 3, (5 * cos(2) + 2 * cos(3) + cos(4) - 13 * cos(1)) / 16];
  }),
  cross: around(12, (i) => polar(i % 3 === 1 ? 0.47 : 1.05, Math.floor(i / 3) * 90 + [18, 45, 72][i % 3])),
};

export class Drawing {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{colours: HTMLElement, tools: HTMLElement, size: HTMLInputElement}} controls
   * @param {() => void} onChange a mark is finished or taken back
   */
  constructor(canvas, controls, onChange) {
    this.canvas = canvas;
    this.pen = canvas.getContext('2d');
    this.size = controls.size;
    this.onChange = onChange;
    this.marks = [];
    this.settled = null; // canvas of the marks that are too old to be taken back
    this.cursor = [canvas.width / 2, canvas.height / 2];
    const colours = Object.entries(COLOURS).map(([name, colour]) => {
      const button = choice(name, colour);
      button.style.backgroundColor = colour;
      return button;
    });
    radios(controls.colours, colours, (value) => (this.colour = value), 4);
    const tools = ['brush', 'eraser', ...Object.keys(SHAPES)].map((name) => {
      const button = choice(name, name);
      button.append(toolIcon(name));
      return button;
    });
    radios(controls.tools, tools, (value) => (this.tool = value), 0);
    canvas.addEventListener('pointerdown', (event) => this.begin(event));
    canvas.addEventListener('pointermove', (event) => this.move(event));
    canvas.addEventListener('pointerup', (event) => this.draws(event) && this.end());
    canvas.addEventListener('pointercancel', (event) => this.draws(event) && this.end());
    canvas.addEventListener('keydown', (event) => this.key(event));
    this.paint();
  }

  get empty() {
    return this.marks.length === 0 && !this.settled;
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  /** Of several fingers, or a pen and the palm, only the one that began the stroke. */
  draws(event) {
    return Boolean(this.mark) && event.pointerId === this.pointer;
  }

  begin(event) {
    if (event.button || !event.isPrimary) return;
    event.preventDefault();
    this.pointer = event.pointerId;
    this.canvas.focus({ preventScroll: true }); // the event's place is that before
    this.canvas.setPointerCapture(event.pointerId);
    this.add(this.place(event));
  }

  add(point) {
    const size = Number(this.size.value);
    const colour = this.tool === 'eraser' ? PAPER : this.colour;
    this.mark = { tool: this.tool, colour, size, points: [point] };
    this.marks.push(this.mark);
    this.settle();
    this.paint();
  }

  /** The oldest marks can no more be taken back, but stay. */
  settle() {
    if (this.marks.length <= UNDO) return;
    const { canvas, marks } = this;
    this.marks = marks.slice(0, -UNDO);
    this.paint();
    this.settled ??= Object.assign(document.createElement('canvas'), { width: canvas.width, height: canvas.height });
    this.settled.getContext('2d').drawImage(canvas, 0, 0);
    this.marks = marks.slice(-UNDO);
  }

  move(event) {
    if (!this.draws(event)) return;
    for (const each of event.getCoalescedEvents?.() ?? [event]) this.mark.points.push(this.place(each));
    this.paint();
  }

  end() {
    if (!this.mark) return;
    this.mark = null;
    this.onChange();
  }

  key(event) {
    const step = event.shiftKey ? 4 : 24;
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (way) {
      this.cursor = this.cursor.map((value, i) => Math.max(0, Math.min(this.canvas.width, value + way[i])));
      this.paint();
      const [x, y] = this.cursor;
      const size = Number(this.size.value) / 2 + 4;
      this.pen.strokeStyle = '#000';
      this.pen.lineWidth = 1.5;
      this.pen.strokeRect(x - size, y - size, 2 * size, 2 * size);
    } else if (event.key === ' ' || event.key === 'Enter') {
      this.add(this.cursor);
      this.end();
    } else if (event.key === 'z' && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else return;
    event.preventDefault();
  }

  undo() {
    if (!this.marks.length) return;
    this.marks = this.marks.slice(0, -1);
    this.paint();
    this.onChange();
  }

  clear() {
    if (this.empty) return;
    this.marks = [];
    this.settled = null;
    this.paint();
    this.onChange();
  }

  paint() {
    const { pen, canvas } = this;
    pen.fillStyle = PAPER;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    if (this.settled) pen.drawImage(this.settled, 0, 0);
    for (const { tool, colour, size, points } of this.marks) {
      pen.fillStyle = pen.strokeStyle = colour;
      if (SHAPES[tool]) this.stamp(SHAPES[tool], size, points);
      else this.stroke(size, points);
    }
  }

  stroke(size, points) {
    const { pen } = this;
    pen.lineWidth = size;
    pen.lineCap = pen.lineJoin = 'round';
    pen.beginPath();
    pen.moveTo(...points[0]);
    for (const point of points) pen.lineTo(...point);
    pen.stroke();
  }

  /** A click makes one of a middling size, pulling says how big. */
  stamp(outline, size, points) {
    const [x, y] = points[0];
    const [toX, toY] = points.at(-1);
    const pulled = Math.hypot(toX - x, toY - y);
    const radius = pulled > 8 ? pulled : 24 + size * 1.5;
    this.pen.beginPath();
    for (const [dx, dy] of outline) this.pen.lineTo(x + dx * radius, y + dy * radius);
    this.pen.fill();
  }
}

function choice(name, value) {
  const button = document.createElement('button');
  button.type = 'button';
  button.value = value;
  button.title = name;
  button.setAttribute('aria-label', name);
  return button;
}

/** One of the buttons is chosen; arrow keys move on. */
function radios(group, buttons, choose, first) {
  const pick = (button) => {
    for (const each of buttons) {
      each.setAttribute('aria-checked', String(each === button));
      each.tabIndex = each === button ? 0 : -1;
    }
    choose(button.value);
  };
  buttons.forEach((button, i) => {
    button.setAttribute('role', 'radio');
    button.addEventListener('click', () => pick(button));
    button.addEventListener('keydown', (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      const next = buttons[(i + step + buttons.length) % buttons.length];
      event.preventDefault();
      pick(next);
      next.focus();
    });
  });
  group.append(...buttons);
  pick(buttons[first]);
}

function toolIcon(name) {
  const make = (tag, attributes) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const icon = make('svg', { viewBox: '0 0 24 24', 'aria-hidden': 'true' });
  const symbol = { brush: '#i-pen', eraser: '#i-eraser' }[name];
  const points = SHAPES[name]?.map(([x, y]) => `${(12 + 8.5 * x).toFixed(1)},${(12 + 8.5 * y).toFixed(1)}`).join(' ');
  icon.append(symbol ? make('use', { href: symbol }) : make('polygon', { points, class: 'solid' }));
  return icon;
}
