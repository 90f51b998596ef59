// What was said and heard, kept in this page until it is saved or the page closes.

import { RATE, toInt16 } from './opus.js';

const MOST = 30 * 60 * RATE; // samples; the oldest are let go beyond

export class Recording {
  constructor() {
    this.clear();
  }

  clear() {
    /** @type {Record<'you'|'model', {at: number, samples: Int16Array}[]>} */
    this.blocks = { you: [], model: [] };
    this.from = null;
    this.to = 0;
  }

  /** Blocks of one call on one clock. Another call goes on where the last one ended. */
  begin() {
    this.shift = null;
  }

  /** @param {'you'|'model'} who @param {Float32Array} samples @param {number} at in samples */
  add(who, samples, at) {
    this.shift ??= this.to - at;
    const place = at + this.shift;
    const row = this.blocks[who];
    row.push({ at: place, samples: Int16Array.from(samples, toInt16) });
    this.to = Math.max(this.to, place + samples.length);
    this.from = Math.max(Math.min(this.from ?? place, place), this.to - MOST); // the sides arrive in any order
    while (row.length && row[0].at < this.from) row.shift();
  }

  get seconds() {
    return this.from === null ? 0 : (this.to - this.from) / RATE;
  }

  /** @param {boolean} two channels, the user's left; else both mixed @returns {Blob} WAV */
  wav(two) {
    const length = this.from === null ? 0 : this.to - this.from;
    const channels = two ? 2 : 1;
    const sound = new Int16Array(length * channels);
    for (const [channel, who] of ['you', 'model'].entries()) {
      for (const { at, samples } of this.blocks[who]) {
        const start = at - this.from;
        for (let i = 0; i < samples.length && start + i < length; i++) {
          if (start + i < 0) continue;
          const place = (start + i) * channels + (two ? channel : 0);
          sound[place] = Math.max(-32768, Math.min(32767, sound[place] + samples[i]));
        }
      }
    }
    return new Blob([wavHeader(sound.byteLength, channels), sound], { type: 'audio/wav' });
  }
}

function wavHeader(bytes, channels) {
  const header = new DataView(new ArrayBuffer(44));
  const letters = (at, text) => [...text].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)));
  letters(0, 'RIFF');
  header.setUint32(4, 36 + bytes, true);
  letters(8, 'WAVEfmt ');
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, channels, true);
  header.setUint32(24, RATE, true);
  header.setUint32(28, RATE * channels * 2, true);
  header.setUint16(32, channels * 2, true);
  header.setUint16(34, 16, true);
  letters(36, 'data');
  header.setUint32(40, bytes, true);
  return header.buffer;
}

/** @param {Blob} blob @param {string} name of the file */
export function download(blob, name) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
