// Settings of the next call, kept in this browser. Only what was changed is sent; the rest is the model's own choice.

import { listDevices } from './audio.js';

const KEY = 'moshivis.settings';
const DEVICES = 'moshivis.devices';
/** How /api/info calls the values that the query names as the released client does. */
const NAMES = {
  text_temperature: 'text_temperature',
  text_topk: 'text_top_k',
  audio_temperature: 'audio_temperature',
  audio_topk: 'audio_top_k',
  xa_start: 'gate_delay',
};

/** @param {string} key @returns {any} what was kept, null for nothing */
export function recall(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

/** @param {string} key @param {any} value */
export function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // storage is switched off or full: it lasts as long as the page
  }
}

export class Settings {
  /**
   * @param {HTMLFormElement} form its ranges are named like the query's parameters
   * @param {{microphone: () => void, speaker: () => void}} onDevice another one was chosen
   */
  constructor(form, onDevice) {
    this.form = form;
    this.usual = {};
    this.changed = {};
    const kept = recall(KEY) ?? {};
    for (const input of this.inputs()) {
      if (Number.isFinite(kept[input.name])) this.changed[input.name] = fit(input, kept[input.name]);
      input.addEventListener('input', () => this.set(input));
      input.addEventListener('change', () => this.show());
    }
    const { microphone, speaker } = recall(DEVICES) ?? {};
    /** Chosen ones, plugged in or not. */
    this.chosen = { microphone: String(microphone ?? ''), speaker: String(speaker ?? '') };
    for (const name of Object.keys(this.chosen)) {
      const select = form.elements[name];
      select.addEventListener('change', () => {
        this.chosen[name] = select.value;
        keep(DEVICES, this.chosen);
        onDevice[name]();
      });
    }
    form.querySelector('#reset').addEventListener('click', () => this.reset());
    this.show();
  }

  inputs() {
    return [...this.form.querySelectorAll('input[name]')];
  }

  /** @param {Record<string, number>} sampling the model's own values, from /api/info */
  setUsual(sampling) {
    for (const [name, key] of Object.entries(NAMES)) this.usual[name] = sampling[key] ?? undefined;
    this.show();
  }

  set(input) {
    const value = Number(input.value);
    if (input.value === '' || value === this.usual[input.name]) delete this.changed[input.name];
    else this.changed[input.name] = fit(input, value);
    keep(KEY, this.changed);
    this.show(input);
  }

  reset() {
    this.changed = {};
    keep(KEY, this.changed);
    this.show();
  }

  show(typing) {
    for (const input of this.inputs()) {
      const value = this.changed[input.name] ?? this.usual[input.name];
      if (input !== typing) input.value = value ?? '';
      const field = input.closest('.field');
      field.classList.toggle('changed', input.name in this.changed);
      const output = field.querySelector('output');
      if (output) output.textContent = value === undefined ? 'usual' : String(value);
    }
  }

  /** @returns {{microphone: string, speaker: string}} ids of the chosen ones, '' is the system's choice */
  devices() {
    return this.chosen;
  }

  /** Offer the devices that there are. */
  async offerDevices() {
    for (const [name, options] of Object.entries(await listDevices())) {
      const select = this.form.elements[name];
      const chosen = this.chosen[name];
      const listed = !chosen || options.some((option) => option.value === chosen);
      const absent = listed ? [] : [new Option('Chosen before, not listed now', chosen)];
      select.replaceChildren(new Option('System default', ''), ...options, ...absent);
      select.value = chosen;
    }
  }

  /** @returns {Record<string, number>} for the query of a call */
  query() {
    return { seed: Math.floor(Math.random() * 1e6), ...this.changed };
  }
}

/** What the server takes: within the bounds, and whole where the steps are. */
function fit(input, value) {
  const within = Math.max(Number(input.min), Math.min(Number(input.max), value));
  return input.step === '1' ? Math.round(within) : within;
}
