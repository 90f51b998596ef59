// What was said, word by word in the colours of the gate, and the gate as a curve.

const PAUSE = 1800; // ms without a word: what follows is a new turn
const AFTER_SENTENCE = 700;
const SEEN = 7; // from this level on a word is underlined, for those who see the colours alike
const CURVE_SECONDS = 24;

/**
 * What gate has which level; the server tells that of its model.
 * @typedef {{low: number, width: number}} GateScale
 */
const RELEASED_SCALE = { low: 0.005, width: 0.016 };

/** @param {number} gate @param {GateScale} scale @returns {number} 0 to 10 */
export function gateLevel(gate, scale) {
  return Math.round(Math.min(Math.max((gate - scale.low) / scale.width, 0), 1) * 10);
}

/**
 * @typedef {object} Turn
 * @property {'model'|'you'} who
 * @property {'spoken'|'written'} form
 * @property {number} at seconds since the beginning
 * @property {{text: string, level: number|null}[]} pieces
 * @property {number} [reaction_ms] @property {number} [seconds]
 */

export class Transcript {
  /** @param {HTMLElement} root @param {HTMLElement} spoken live region that gets whole sentences */
  constructor(root, spoken) {
    this.root = root;
    this.spoken = spoken;
    this.welcome = root.firstElementChild;
    this.clear();
  }

  clear() {
    /** @type {Turn[]} */
    this.turns = [];
    this.started = performance.now();
    this.current = null; // what the model is saying
    this.interrupted = false; // by the user, since the model's turn began
    this.reaction = null;
    this.root.replaceChildren(this.welcome);
  }

  get empty() {
    return this.turns.length === 0;
  }

  /** A word or a part of one from the model. @param {string} text @param {number|null} level */
  say(text, level) {
    const now = performance.now();
    const pause = now - this.lastPiece;
    const ended = this.interrupted || /[.?!]\s*$/.test(this.current?.element.textContent ?? '');
    if (!this.current || pause > PAUSE || (ended && pause > AFTER_SENTENCE)) this.beginAnswer();
    this.lastPiece = now;
    this.addPiece(this.current, text, level);
    this.announce();
  }

  beginAnswer() {
    this.finishSentence();
    this.interrupted = false;
    this.current = this.addTurn({ who: 'model', form: 'spoken', pieces: [] });
    if (this.reaction !== null) this.showReaction();
  }

  addPiece(turn, text, level) {
    const piece = document.createElement('span');
    const word = text.trimStart();
    piece.textContent = word;
    if (level !== null) piece.className = level >= SEEN ? `g${level} seen` : `g${level}`;
    if (turn.pieces.length && word !== text) turn.element.append(' ');
    turn.element.append(piece);
    turn.pieces.push({ text, level });
    this.follow();
  }

  /** ms from the user's last word to the answer's first sound; belongs to the answer that begins now or just has. */
  react(ms) {
    this.reaction = ms;
    if (this.current && performance.now() - this.lastPiece < PAUSE) this.showReaction();
  }

  showReaction() {
    if (this.current.reaction_ms === undefined) {
      this.current.reaction_ms = Math.round(this.reaction);
      this.current.meta.textContent = `after ${(this.reaction / 1000).toFixed(2)} s`;
      this.follow();
    }
    this.reaction = null;
  }

  /** The user begins to speak. */
  beginSpeech() {
    this.interrupted = true;
    this.reaction = null;
    this.speech = this.addTurn({ who: 'you', form: 'spoken', pieces: [] });
    this.speech.levels = [];
    this.speech.canvas = document.createElement('canvas');
    this.speech.element.append(this.speech.canvas);
    this.speech.meta.textContent = 'You speak';
  }

  /** @param {number} level of the meter */
  duringSpeech(level) {
    this.speech?.levels.push(level);
    if (this.speech?.levels.length % 5 === 0) drawWave(this.speech.canvas, this.speech.levels);
  }

  /** @param {number} seconds */
  endSpeech(seconds) {
    if (!this.speech) return;
    drawWave(this.speech.canvas, this.speech.levels);
    this.speech.seconds = Number(seconds.toFixed(2));
    this.speech.meta.textContent = `You spoke for ${seconds.toFixed(1)} s`;
    this.speech = null;
  }

  /**
   * A question in writing. @param {string} text
   * @returns {(pieces: {text: string, level: number|null}[]|null) => void} takes the answer, null if there is none
   */
  ask(text) {
    this.interrupted = true;
    const question = this.addTurn({ who: 'you', form: 'written', pieces: [] });
    this.addPiece(question, text, null);
    const answer = this.addTurn({ who: 'model', form: 'written', pieces: [] });
    answer.element.classList.add('waiting');
    return (pieces) => {
      answer.element.classList.remove('waiting');
      if (!pieces?.length) {
        this.turns.splice(this.turns.indexOf(answer), 1);
        answer.box.remove();
        return;
      }
      for (const { text, level } of pieces) this.addPiece(answer, text, level);
      answer.meta.textContent = 'in writing';
      this.follow();
      this.spoken.textContent = answer.element.textContent;
    };
  }

  /** Something that happened. @param {string} text */
  note(text) {
    const box = document.createElement('p');
    box.className = 'turn event';
    box.textContent = text;
    this.welcome.remove();
    this.root.append(box);
    this.finishSentence(text);
    this.follow();
  }

  addTurn(turn) {
    const box = document.createElement('div');
    box.className = `turn ${turn.who}`;
    const element = document.createElement('p');
    element.className = 'text';
    const meta = document.createElement('p');
    meta.className = 'meta';
    box.append(element, meta);
    this.welcome.remove();
    this.root.append(box);
    const full = { at: Number(((performance.now() - this.started) / 1000).toFixed(2)), ...turn, box, element, meta };
    this.turns.push(full);
    this.follow();
    return full;
  }

  /** Keep the newest in view, unless the user scrolled up. */
  follow() {
    const { scrollHeight, scrollTop, clientHeight } = this.root;
    if (scrollHeight - scrollTop - clientHeight < 160) this.root.scrollTop = scrollHeight;
  }

  /** Screen readers get whole sentences: single words would be torn. */
  announce() {
    clearTimeout(this.timer);
    const whole = /[.?!]\s*$/.test(this.current.element.textContent);
    this.timer = setTimeout(() => this.finishSentence(), whole ? AFTER_SENTENCE : PAUSE);
  }

  /** @param {string} more to tell after it */
  finishSentence(more = '') {
    clearTimeout(this.timer);
    const sentence = this.current?.element.textContent ?? '';
    if (sentence || more) this.spoken.textContent = `${sentence} ${more}`.trim();
    this.current = null;
  }

  /** @returns {Turn[]} as plain data */
  toJSON() {
    return this.turns.map(({ who, form, at, pieces, reaction_ms, seconds }) => {
      const text = pieces.reduce((all, piece) => all + piece.text, '').trim();
      return { who, form, at, text, pieces, reaction_ms, seconds };
    });
  }

  /** @returns {string} for people */
  toText() {
    const lines = this.toJSON().map(({ who, text, seconds, at }) => {
      const time = `${Math.floor(at / 60)}:${String(Math.floor(at % 60)).padStart(2, '0')}`;
      return `[${time}] ${who === 'you' ? 'You' : 'Model'}: ${text || `(spoke for ${seconds ?? '?'} s)`}`;
    });
    return `${lines.join('\n')}\n`;
  }
}

function drawWave(canvas, levels) {
  const pen = prepare(canvas);
  const { width, height } = canvas;
  const bars = 28;
  const step = Math.max(1, levels.length / bars);
  pen.fillStyle = getComputedStyle(canvas).color;
  for (let i = 0; i < Math.min(bars, levels.length); i++) {
    const part = levels.slice(Math.floor(i * step), Math.floor((i + 1) * step));
    const tall = Math.max(height * 0.1, Math.max(...part) ** 2 * height);
    pen.beginPath();
    pen.roundRect(((i + 0.2) / bars) * width, (height - tall) / 2, (0.6 / bars) * width, tall, width / bars);
    pen.fill();
  }
}

/** Fit a canvas to its place on the screen. */
function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  return canvas.getContext('2d');
}

/** The gate of every frame over the last seconds. */
export class GateCurve {
  /** @param {HTMLCanvasElement} canvas @param {HTMLElement} legend gets a swatch of each level */
  constructor(canvas, legend) {
    this.canvas = canvas;
    this.swatches = Array.from({ length: 11 }, (_, level) => {
      const swatch = document.createElement('i');
      swatch.className = `g${level}`;
      return swatch;
    });
    legend.append(...this.swatches);
    this.scale = RELEASED_SCALE;
    this.frameRate = 12.5;
    this.clear();
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  clear() {
    this.values = [];
    this.draw();
  }

  /** @param {number[]} values of the frames since the last call */
  add(values) {
    this.values = [...this.values, ...values].slice(-Math.round(CURVE_SECONDS * this.frameRate));
    this.draw();
  }

  draw() {
    const pen = prepare(this.canvas);
    const { width, height } = this.canvas;
    const pad = height * 0.08;
    const room = height - 2 * pad;
    const colours = this.swatches.map((swatch) => getComputedStyle(swatch).color);
    const paint = pen.createLinearGradient(0, height - pad, 0, pad);
    colours.forEach((colour, level) => paint.addColorStop(level / 10, colour));
    const { low, width: range } = this.scale;
    const heights = this.values.map((gate) => Math.min(Math.max((gate - low) / range, 0), 1.05));
    const step = width / (CURVE_SECONDS * this.frameRate - 1);
    const x = (i) => width - (heights.length - 1 - i) * step;
    const y = (share) => height - pad - share * room;

    pen.globalAlpha = 0.35;
    pen.fillStyle = colours[5];
    pen.fillRect(0, Math.round(height - pad), width, 1);
    if (heights.length < 2) return;
    const line = new Path2D();
    heights.forEach((share, i) => line.lineTo(x(i), y(share)));
    const area = new Path2D(line);
    area.lineTo(width, height - pad);
    area.lineTo(x(0), height - pad);
    pen.globalAlpha = 0.22;
    pen.fillStyle = paint;
    pen.fill(area);
    pen.globalAlpha = 1;
    pen.strokeStyle = paint;
    pen.lineWidth = 2 * (window.devicePixelRatio || 1);
    pen.lineJoin = 'round';
    pen.stroke(line);
  }
}
