// Sound on the wire: Ogg/Opus made and read with WebCodecs, or 16-bit PCM where a browser has no Opus for us.

export const RATE = 24000; // of the model, and of everything in this page
const PACKET = 480; // samples, 20 ms
const PACKETS_A_PAGE = 2;
const BOS = 2;

const CRC = Uint32Array.from({ length: 256 }, (_, i) => {
  let value = i << 24;
  for (let bit = 0; bit < 8; bit++) value = (value << 1) ^ (value & 0x80000000 ? 0x04c11db7 : 0);
  return value;
});

function checksum(bytes) {
  let value = 0;
  for (const byte of bytes) value = (value << 8) ^ CRC[(value >>> 24) ^ byte];
  return value >>> 0;
}

/** Opus packets to pages of one Ogg stream (RFC 3533, RFC 7845). */
export class OggWriter {
  constructor() {
    this.serial = (Math.random() * 2 ** 32) >>> 0;
    this.sequence = 0;
    this.granule = 0; // at 48 kHz, as the format wants it
  }

  /** @returns {Uint8Array[]} the two header pages */
  headers() {
    const head = new Uint8Array(19);
    const view = new DataView(head.buffer);
    head.set(new TextEncoder().encode('OpusHead'));
    head[8] = 1; // version
    head[9] = 1; // channel
    view.setUint16(10, 312, true); // samples of the encoder's delay
    view.setUint32(12, RATE, true);
    const tags = new TextEncoder().encode('OpusTags\x08\0\0\0moshivis\0\0\0\0');
    return [this.page([head], 0, BOS), this.page([tags], 0)];
  }

  /**
   * @param {Uint8Array[]} packets
   * @param {number} samples that they hold, at 48 kHz
   * @returns {Uint8Array}
   */
  page(packets, samples, flags = 0) {
    const lacing = packets.flatMap((packet) => [
      ...new Array(Math.floor(packet.length / 255)).fill(255),
      packet.length % 255,
    ]);
    const size = packets.reduce((sum, packet) => sum + packet.length, 27 + lacing.length);
    const page = new Uint8Array(size);
    const view = new DataView(page.buffer);
    this.granule += samples;
    page.set(new TextEncoder().encode('OggS'));
    page[5] = flags;
    view.setBigUint64(6, BigInt(this.granule), true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.sequence++, true);
    page[26] = lacing.length;
    page.set(lacing, 27);
    let at = 27 + lacing.length;
    for (const packet of packets) {
      page.set(packet, at);
      at += packet.length;
    }
    view.setUint32(22, checksum(page), true);
    return page;
  }
}

/**
 * @param {Uint8Array} bytes of a message, which holds whole pages; damaged ones are left out
 * @returns {Uint8Array[]} the packets of sound in them, without the two header packets
 */
export function readPages(bytes) {
  const packets = [];
  let at = findCapture(bytes, 0);
  while (at >= 0) {
    const page = bytes.slice(at, at + pageSize(bytes, at));
    const whole = page.length > 27 && isIntact(page);
    if (whole) packets.push(...readPage(page));
    at = findCapture(bytes, at + (whole ? page.length : 4));
  }
  return packets;
}

function findCapture(bytes, from) {
  for (let at = bytes.indexOf(0x4f, from); at >= 0; at = bytes.indexOf(0x4f, at + 1)) {
    if (bytes[at + 1] === 0x67 && bytes[at + 2] === 0x67 && bytes[at + 3] === 0x53) return at;
  }
  return -1;
}

function pageSize(bytes, start) {
  const body = start + 27 + bytes[start + 26];
  return bytes.subarray(start + 27, body).reduce((sum, length) => sum + length, body - start);
}

function isIntact(page) {
  const view = new DataView(page.buffer);
  const expected = view.getUint32(22, true);
  view.setUint32(22, 0, true);
  return checksum(page) === expected;
}

function readPage(page) {
  const packets = [];
  let at = 27 + page[26];
  let begin = at;
  for (const length of page.subarray(27, at)) {
    at += length;
    if (length === 255) continue;
    const packet = page.subarray(begin, at);
    begin = at;
    if (packet.length && !isHeader(packet)) packets.push(packet);
  }
  return packets;
}

function isHeader(packet) {
  const name = String.fromCharCode(...packet.subarray(0, 8));
  return name === 'OpusHead' || name === 'OpusTags';
}

const ENCODER = { codec: 'opus', sampleRate: RATE, numberOfChannels: 1, bitrate: 32000, opus: { application: 'voip' } };
const DECODER = { codec: 'opus', sampleRate: 48000, numberOfChannels: 1 };

/** @returns {Promise<boolean>} whether this browser can both make and read Opus */
export async function hasOpus() {
  try {
    const answers = await Promise.all([
      AudioEncoder.isConfigSupported(ENCODER),
      AudioDecoder.isConfigSupported(DECODER),
    ]);
    return answers.every((answer) => answer.supported);
  } catch {
    return false;
  }
}

class OpusSender {
  constructor(send) {
    this.send = send;
    this.ogg = new OggWriter();
    this.packets = [];
    this.samples = 0;
    this.ogg.headers().forEach(send);
    this.open();
  }

  open() {
    this.failed = false;
    const error = () => (this.failed = true); // another one is made for the next block: not at once, again and again
    this.encoder = new AudioEncoder({ output: (chunk) => this.encoded(chunk), error });
    this.encoder.configure(ENCODER);
  }

  push(samples) {
    if (this.failed) this.open();
    if (this.encoder.state !== 'configured') return;
    const timestamp = Math.round((this.samples / RATE) * 1e6);
    const layout = { format: 'f32', sampleRate: RATE, numberOfFrames: samples.length, numberOfChannels: 1 };
    const data = new AudioData({ ...layout, timestamp, data: samples });
    this.samples += samples.length;
    this.encoder.encode(data);
    data.close();
  }

  encoded(chunk) {
    const packet = new Uint8Array(chunk.byteLength);
    chunk.copyTo(packet);
    this.packets.push(packet);
    if (this.packets.length < PACKETS_A_PAGE) return;
    this.send(this.ogg.page(this.packets, PACKETS_A_PAGE * PACKET * 2));
    this.packets = [];
  }

  close() {
    if (this.encoder.state !== 'closed') this.encoder.close();
  }
}

class OpusReceiver {
  constructor(play) {
    this.play = play;
    this.timestamp = 0;
    this.open();
  }

  open() {
    this.decoder = new AudioDecoder({ output: (data) => this.decoded(data), error: () => this.open() });
    this.decoder.configure(DECODER);
  }

  push(bytes) {
    for (const data of readPages(bytes)) {
      if (this.decoder.state !== 'configured') return;
      this.decoder.decode(new EncodedAudioChunk({ type: 'key', timestamp: this.timestamp, data }));
      this.timestamp += 20000;
    }
  }

  decoded(data) {
    const samples = new Float32Array(data.numberOfFrames);
    data.copyTo(samples, { planeIndex: 0, format: 'f32-planar' });
    this.play(samples, data.sampleRate);
    data.close();
  }

  close() {
    if (this.decoder.state !== 'closed') this.decoder.close();
  }
}

class PcmSender {
  constructor(send) {
    this.send = send;
  }

  push(samples) {
    const bytes = new DataView(new ArrayBuffer(2 * samples.length));
    samples.forEach((value, i) => bytes.setInt16(2 * i, toInt16(value), true));
    this.send(new Uint8Array(bytes.buffer));
  }

  close() {}
}

class PcmReceiver {
  constructor(play) {
    this.play = play;
  }

  push(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const samples = new Float32Array(bytes.byteLength >> 1);
    for (let i = 0; i < samples.length; i++) samples[i] = view.getInt16(2 * i, true) / 32768;
    this.play(samples, RATE);
  }

  close() {}
}

/** @param {number} value -1 to 1, what lies outside is cut off */
export function toInt16(value) {
  return Math.round(Math.max(-1, Math.min(1, value)) * 32767);
}

/**
 * @param {'ogg'|'pcm'} format
 * @param {(bytes: Uint8Array) => void} send called with what is to go into one message
 * @returns {{push: (samples: Float32Array) => void, close: () => void}} takes blocks of 20 ms at 24 kHz
 */
export function makeSender(format, send) {
  return format === 'ogg' ? new OpusSender(send) : new PcmSender(send);
}

/**
 * @param {'ogg'|'pcm'} format
 * @param {(samples: Float32Array, rate: number) => void} play
 * @returns {{push: (bytes: Uint8Array) => void, close: () => void}} takes the payload of audio messages
 */
export function makeReceiver(format, play) {
  return format === 'ogg' ? new OpusReceiver(play) : new PcmReceiver(play);
}
