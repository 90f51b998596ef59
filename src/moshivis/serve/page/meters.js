// Levels of both sides: the meters, and from them who speaks when and how long an answer takes.

import { RATE } from './opus.js';

const FLOOR = -54; // dB of full scale where a meter begins
const AUDIBLE = 0.01; // root mean square
const BELOW_LOUDEST = 0.05; // on a noisy line, what is 26 dB below the loudest speech is background
const PAUSE = 0.4 * RATE; // shorter silences belong to the speech around them
const SHORTEST = 0.12 * RATE; // of sound that counts as speech

/** @param {Float32Array} samples @returns {number} root mean square */
export function loudness(samples) {
  let sum = 0;
  for (const value of samples) sum += value * value;
  return Math.sqrt(sum / samples.length);
}

/** @param {number} rms @returns {number} 0 to 1 as a meter shows it */
export function meterLevel(rms) {
  return Math.max(0, Math.min(1, 1 - (20 * Math.log10(rms + 1e-9)) / FLOOR));
}

/** A level meter; elements get the level as the CSS property --level. */
export class Meter {
  /** @param {HTMLElement} bar with role="meter" @param {HTMLElement} [glow] also follows the level */
  constructor(bar, glow) {
    this.elements = glow ? [bar, glow] : [bar];
    this.bar = bar;
    this.level = 0;
    this.scheduled = false;
    this.told = 0;
  }

  /** @param {number} rms of the newest block */
  show(rms) {
    this.level = Math.max(meterLevel(rms), this.level * 0.82); // rises at once, falls gently
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame((now) => {
      this.scheduled = false;
      for (const element of this.elements) element.style.setProperty('--level', this.level.toFixed(3));
      if (now - this.told < 500) return;
      this.told = now;
      this.bar.setAttribute('aria-valuenow', String(Math.round(this.level * 100)));
    });
  }

  clear() {
    this.level = 0;
    this.show(0);
  }
}

/** Finds stretches of speech in a row of blocks. */
class Voice {
  constructor() {
    this.loudest = 0;
    this.begin = null; // in samples, of the speech under way
    this.end = 0; // of its last audible block
    this.sound = 0; // audible samples in it
  }

  /** @returns {'begun'|'ended'|null} what this block decided */
  hear(rms, at, length) {
    this.loudest = Math.max(this.loudest * 0.9995, rms);
    if (rms > Math.max(AUDIBLE, BELOW_LOUDEST * this.loudest)) {
      this.begin ??= at;
      const before = this.sound;
      this.sound += length;
      this.end = at + length;
      return before < SHORTEST && this.sound >= SHORTEST ? 'begun' : null;
    }
    if (this.begin === null || at - this.end < PAUSE) return null;
    const real = this.sound >= SHORTEST;
    this.last = { begin: this.begin, end: this.end };
    this.begin = null;
    this.sound = 0;
    return real ? 'ended' : null;
  }

  get speaking() {
    return this.begin !== null && this.sound >= SHORTEST;
  }
}

/**
 * Watches both sides on one clock.
 * @typedef {object} TalkEvents
 * @property {() => void} speechBegin the user speaks
 * @property {(level: number) => void} speechLevel a meter's level, every 20 ms while the user speaks
 * @property {(seconds: number) => void} speechEnd the user has spoken so long
 * @property {(ms: number) => void} reaction from the end of the user's speech to the first sound of the answer
 */
export class TalkWatch {
  /** @param {TalkEvents} on */
  constructor(on) {
    this.on = on;
    this.user = new Voice();
    this.model = new Voice();
    this.question = null; // the user's last stretch of speech, until it is answered
  }

  /** @param {number} rms @param {number} at in samples @param {number} length */
  hearUser(rms, at, length) {
    const news = this.user.hear(rms, at, length);
    if (news === 'begun') {
      this.question = null;
      this.on.speechBegin();
    }
    if (this.user.speaking) this.on.speechLevel(meterLevel(rms));
    if (news !== 'ended') return;
    const { begin, end } = this.user.last;
    this.on.speechEnd((end - begin) / RATE);
    this.question = { begin, end };
    if (this.model.speaking && this.model.begin >= begin) this.answered(this.model.begin);
  }

  /** @param {number} rms @param {number} at in samples @param {number} length */
  hearModel(rms, at, length) {
    if (this.model.hear(rms, at, length) === 'begun' && this.question) this.answered(this.model.begin);
  }

  /** The call or its connection is over: so is the speech under way. */
  stop() {
    const { begin, end, speaking } = this.user;
    if (speaking) this.on.speechEnd((end - begin) / RATE);
    this.user = new Voice();
    this.model = new Voice();
    this.question = null;
  }

  answered(onset) {
    const ms = ((onset - this.question.end) / RATE) * 1000;
    this.question = null;
    if (ms >= 0) this.on.reaction(ms); // else it spoke into the question
  }
}
