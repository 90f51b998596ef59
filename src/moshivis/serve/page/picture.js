// The picture that is talked about: from the gallery, drawn, from the camera, uploaded, pasted or dropped.

import { Camera } from './camera.js';
import { element, tell } from './dom.js';
import { Drawing } from './draw.js';
import { shrink } from './encoding.js';
import { server } from './wire.js';

const FIRST_SEEDS = [34, 148, 12, 124, 186, 153]; // clear scenes to begin with

/**
 * @typedef {object} Picture
 * @property {Blob} blob encoded
 * @property {string} name for people
 * @property {'gallery'|'draw'|'camera'|'upload'} source
 * @property {boolean} [live] one of a camera's many
 * @property {boolean} [refused] by the server
 * @property {number} [seed] of the gallery
 */

export class PicturePanel {
  /** @param {(picture: Picture|null) => void} onChange @param {(text: string) => void} onProblem */
  constructor(onChange, onProblem) {
    this.onChange = onChange;
    this.onProblem = onProblem;
    /** @type {Picture|null} */
    this.current = null;
    /** @type {boolean|undefined} */
    this.able = undefined; // until it is known whether the model can see
    this.choices = 0;
    this.message = '';
    this.shown = element('shown');
    this.video = element('video');
    this.canvas = element('drawing');
    this.drawing = new Drawing(
      this.canvas,
      { colours: element('colours'), tools: element('shapes'), size: element('brush') },
      () => this.useDrawing(),
    );
    this.camera = new Camera(this.video, {
      choose: () => this.choose(),
      take: (picture) => this.use(picture),
      film: () => this.stage(),
      problem: onProblem,
    });
    this.tabs = [...document.querySelectorAll('.sources [role="tab"]')];
    this.bind();
  }

  bind() {
    this.tabs.forEach((tab, i) => {
      tab.addEventListener('click', () => this.open(tab));
      tab.addEventListener('keydown', (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = this.tabs[(i + step + this.tabs.length) % this.tabs.length];
        next.focus();
        this.open(next);
      });
    });
    element('shuffle').addEventListener('click', () => this.shuffle());
    element('undo').addEventListener('click', () => this.drawing.undo());
    element('clear').addEventListener('click', () => this.drawing.clear());
    element('remove').addEventListener('click', () => this.remove());
    element('file').addEventListener('change', ({ target }) => {
      this.useFile(target.files[0]);
      target.value = '';
    });
    document.addEventListener('paste', (event) => {
      const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith('image/'));
      const typed = event.target.closest?.('input') && event.clipboardData.types.includes('text/plain');
      if (!file || typed) return; // office programs put a picture of the text beside it
      event.preventDefault();
      this.useFile(file);
    });
    this.bindDrop();
  }

  bindDrop() {
    const { classList } = document.body;
    let depth = 0;
    const withFile = (act) => (event) => {
      if (!event.dataTransfer?.types.includes('Files')) return;
      event.preventDefault();
      act(event);
    };
    const dropped = ({ dataTransfer }) => {
      depth = 0;
      classList.remove('dropping');
      this.useFile(dataTransfer.files[0]);
    };
    const enter = (step) => () => classList.toggle('dropping', (depth += step) > 0 && Boolean(this.able));
    addEventListener('dragenter', withFile(enter(1)));
    addEventListener('dragleave', withFile(enter(-1)));
    addEventListener('dragover', withFile(enter(0)));
    addEventListener('drop', withFile(dropped));
  }

  /** Show a source's panel, and on the stage what belongs to it. */
  open(tab) {
    for (const each of this.tabs) {
      const chosen = each === tab;
      each.setAttribute('aria-selected', String(chosen));
      each.tabIndex = chosen ? 0 : -1;
      element(each.getAttribute('aria-controls')).hidden = !chosen;
    }
    this.source = tab.id.replace('tab-', '');
    if (this.source === 'camera') this.camera.open();
    else this.camera.close();
    if (this.source === 'draw' && !this.drawing.empty) this.useDrawing();
    this.stage();
  }

  stage() {
    const drawing = this.source === 'draw';
    const filming = this.source === 'camera' && !(this.camera.taken && this.current);
    this.canvas.hidden = !drawing;
    this.video.hidden = !filming;
    this.shown.hidden = drawing || filming || !this.current;
    element('no-picture').hidden = drawing || filming || Boolean(this.current);
    element('remove').hidden = drawing || filming || !this.current;
    const drawn = !this.drawing.empty || this.current?.source === 'draw'; // perhaps all white
    const there = drawing ? drawn : !filming || (this.camera.live && this.current?.live);
    const seen = there && !this.current?.refused;
    const unseen = this.current ? 'The model still sees the picture before' : 'The model sees no picture yet';
    tell('picture-status', this.message || (seen ? '' : unseen));
  }

  /** @param {string} message on the picture, '' for none */
  say(message) {
    this.message = message;
    this.stage();
  }

  /**
   * Somebody chooses a picture: one chosen before that is still being drawn or read comes too late.
   * @returns {() => boolean} whether no other has been chosen since
   */
  choose() {
    clearTimeout(this.timer);
    const number = ++this.choices;
    return () => number === this.choices;
  }

  /** @param {Picture} picture */
  use(picture) {
    this.current = picture;
    picture.refused = false;
    const old = this.shown.src;
    this.shown.src = URL.createObjectURL(picture.blob);
    this.shown.alt = picture.name;
    if (old) URL.revokeObjectURL(old);
    this.mark(picture.seed);
    this.stage();
    this.onChange(picture);
  }

  /** The server cannot use the picture. */
  refuse() {
    if (this.current) this.current.refused = true;
  }

  remove() {
    this.choose();
    this.current = null;
    this.mark(undefined);
    this.camera.film();
    this.onChange(null);
    this.tabs.find((tab) => tab.tabIndex === 0).focus();
  }

  mark(seed) {
    for (const thumb of element('thumbs').children) {
      thumb.setAttribute('aria-pressed', String(seed !== undefined && thumb.value === String(seed)));
    }
  }

  useDrawing() {
    const isLast = this.choose();
    this.timer = setTimeout(() => {
      this.canvas.toBlob((blob) => isLast() && this.use({ blob, name: 'Your drawing', source: 'draw' }), 'image/png');
    }, 250);
  }

  /** @param {File|undefined} file */
  async useFile(file) {
    if (!file || this.able === false) return;
    if (!this.able) {
      this.onProblem('The server has not told yet whether its model sees. Try again in a moment.');
      return;
    }
    if (!file.type.startsWith('image/')) {
      this.onProblem(`“${file.name}” is not a picture.`);
      return;
    }
    const isLast = this.choose();
    try {
      const blob = await shrink(file);
      if (!isLast()) return;
      this.open(element('tab-upload'));
      this.use({ blob, name: file.name || 'Your picture', source: 'upload' });
    } catch {
      this.onProblem(`This browser cannot read “${file.name}”. Try a PNG or JPEG file.`);
    }
  }

  /** Fill the gallery; its first picture is shown unless there is another. */
  async fill(seeds = FIRST_SEEDS) {
    const pictures = await Promise.all(seeds.map(fetchScene));
    element('thumbs').replaceChildren(...pictures.map((picture) => this.thumb(picture)));
    this.mark(this.current?.seed);
    if (!this.current) this.use(pictures[0]);
  }

  thumb(picture) {
    const button = document.createElement('button');
    const image = document.createElement('img');
    image.src = URL.createObjectURL(picture.blob);
    image.onload = () => URL.revokeObjectURL(image.src);
    image.alt = picture.name;
    button.type = 'button';
    button.value = picture.seed;
    button.title = picture.name;
    button.append(image);
    button.addEventListener('click', () => {
      this.choose();
      this.use(picture);
    });
    return button;
  }

  async shuffle() {
    try {
      await this.fill(FIRST_SEEDS.map(() => Math.floor(Math.random() * 1e6)));
    } catch (error) {
      this.onProblem(error.message);
    }
  }
}

/** A drawn scene; the server tells what is on it. @returns {Promise<Picture>} */
async function fetchScene(seed) {
  const response = await server.fetch('api/scene', { seed });
  const { objects } = JSON.parse(response.headers.get('X-Scene'));
  const name = objects.map(({ size, colour, shape }) => `${size} ${colour} ${shape}`).join(', ');
  return { seed, name, source: 'gallery', blob: await response.blob() };
}
