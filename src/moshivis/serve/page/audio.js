// Microphone and loudspeaker: one AudioContext with the worklets around it.

const PROCESSING = { echoCancellation: true, noiseSuppression: true, autoGainControl: true, channelCount: 1 };

/**
 * @typedef {object} SoundEvents
 * @property {(block: {samples: Float32Array, at: number}) => void} mic 20 ms of the user, `at` in samples at 24 kHz
 * @property {(block: {samples: Float32Array, at: number}) => void} heard 20 ms of what was played, on the same clock
 * @property {(report: {level: number, start: number, played: number, missed: number, underruns: number}) => void} buffer
 * in ms, five times a second
 * @property {() => void} unplugged the microphone is gone
 * @property {(running: boolean) => void} running whether sound flows: a phone call or the lock screen may stop it
 */

export class Sound {
  /** @param {SoundEvents} on */
  constructor(on) {
    this.on = on;
    this.muted = false;
    this.wanted = ''; // the microphone that was chosen
    this.speaker = '';
    this.changes = 0; // of the microphone: the last one counts, whichever the browser is done with first
  }

  /**
   * Ask for the microphone and begin to listen.
   * @param {{microphone: string, speaker: string}} devices ids, '' is the system's choice
   * @throws {DOMException} what getUserMedia throws
   */
  async open({ microphone, speaker }) {
    // Made first, while the click still counts as permission to make sound.
    const context = (this.context = new AudioContext({ latencyHint: 'interactive' }));
    this.wanted = microphone;
    try {
      const stream = await openMicrophone(microphone);
      if (!this.context) return stopTracks(stream); // hung up while the browser was asking
      this.stream = stream;
      await Promise.all(['capture', 'playback'].map((name) => this.context.audioWorklet.addModule(workletUrl(name))));
      await this.setSpeaker(speaker);
      await this.context.resume();
      this.connect();
      context.onerror = () => this.loseSpeaker();
      context.onstatechange = () => context.state !== 'closed' && this.on.running(context.state === 'running');
    } catch (error) {
      this.close();
      throw error;
    }
  }

  connect() {
    const mono = { channelCount: 1, channelCountMode: 'explicit', outputChannelCount: [1] };
    this.playback = new AudioWorkletNode(this.context, 'playback', { numberOfInputs: 0, ...mono });
    this.playback.port.onmessage = ({ data }) => this.on.buffer(data);
    this.microphone = new AudioWorkletNode(this.context, 'capture', mono);
    this.microphone.port.onmessage = ({ data }) => this.on.mic(data);
    const heard = new AudioWorkletNode(this.context, 'capture', mono);
    heard.port.onmessage = ({ data }) => this.on.heard(data);
    this.playback.connect(this.context.destination);
    this.playback.connect(heard);
    // Their output is silence; the connection keeps them running.
    this.microphone.connect(this.context.destination);
    heard.connect(this.context.destination);
    this.listen();
  }

  listen() {
    this.source?.disconnect();
    this.source = this.context.createMediaStreamSource(this.stream);
    this.source.connect(this.microphone);
    const [track] = this.stream.getAudioTracks();
    track.enabled = !this.muted;
    track.onended = () => this.on.unplugged();
  }

  /** @param {string} id change the microphone during a call */
  async setMicrophone(id) {
    if (!this.source) return;
    const change = ++this.changes;
    this.wanted = id;
    const isLast = () => this.context && change === this.changes;
    const stream = await openMicrophone(id).catch((error) => {
      if (isLast()) throw error;
    });
    if (!isLast()) return stopTracks(stream);
    stopTracks(this.stream);
    this.stream = stream;
    this.listen();
  }

  /** Whether the microphone is there, and the one that was chosen. */
  get hears() {
    if (!this.source) return true; // none yet
    const [track] = this.stream.getAudioTracks();
    return track.readyState === 'live' && (!this.wanted || track.getSettings().deviceId === this.wanted);
  }

  /** Let sound flow again after the system has stopped it. */
  async wake() {
    await this.context?.resume().catch(() => undefined); // it may need another tap
  }

  /** @param {string} id where the browser can choose one; if it is not plugged in, the system's choice */
  async setSpeaker(id) {
    if (!this.context || !canChooseSpeaker() || id === this.speaker) return;
    this.speaker = id;
    try {
      await this.context.setSinkId(id);
    } catch (error) {
      if (!this.context || this.speaker !== id) return; // hung up, or another was chosen since
      this.speaker = '';
      if (error.name !== 'NotFoundError') throw error;
      await this.context.setSinkId('');
    }
  }

  /** The chosen loudspeaker was unplugged, which stops all sound: go on with the system's. */
  async loseSpeaker() {
    if (!this.context || !this.speaker) return;
    this.speaker = '';
    await this.context.setSinkId('').catch(() => undefined);
    await this.wake();
  }

  /** @param {boolean} muted the model then hears silence */
  mute(muted) {
    this.muted = muted;
    this.stream?.getAudioTracks().forEach((track) => (track.enabled = !muted));
  }

  /** @param {Float32Array} samples mono @param {number} rate of them */
  play(samples, rate) {
    this.playback?.port.postMessage({ samples, rate }, [samples.buffer]);
  }

  /** Another stream begins: forget what waits to be played. */
  reset() {
    this.playback?.port.postMessage({ reset: true });
  }

  /** The stream is over: silence from here on is not missed sound. */
  finish() {
    this.playback?.port.postMessage({ finish: true });
  }

  close() {
    stopTracks(this.stream);
    this.context?.close();
    this.context = this.stream = this.source = this.playback = undefined;
  }
}

/** @returns {boolean} whether the loudspeaker can be chosen here */
export function canChooseSpeaker() {
  return typeof AudioContext !== 'undefined' && 'setSinkId' in AudioContext.prototype;
}

/** @returns {Promise<Record<'microphone'|'speaker', HTMLOptionElement[]>>} the devices that there are, for a select */
export async function listDevices() {
  const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  const options = (kind, name) =>
    devices
      .filter((device) => device.kind === kind && !['', 'default'].includes(device.deviceId))
      .map((device, i) => new Option(device.label || `${name} ${i + 1}`, device.deviceId));
  return { microphone: options('audioinput', 'Microphone'), speaker: options('audiooutput', 'Loudspeaker') };
}

async function openMicrophone(id) {
  const device = id ? { deviceId: { exact: id } } : {};
  try {
    return await navigator.mediaDevices.getUserMedia({ audio: { ...PROCESSING, ...device } });
  } catch (error) {
    if (!id || !['OverconstrainedError', 'NotFoundError'].includes(error.name)) throw error;
    return navigator.mediaDevices.getUserMedia({ audio: PROCESSING }); // the chosen one is not plugged in
  }
}

function workletUrl(name) {
  return new URL(`${name}-worklet.js`, import.meta.url).href;
}

function stopTracks(stream) {
  stream?.getTracks().forEach((track) => track.stop());
}
