// One call, from the click to the end: microphone, connection, sound both ways, and what happens when one of them fails.

import { Sound } from './audio.js';
import { loudness, TalkWatch } from './meters.js';
import { hasOpus, makeReceiver, makeSender } from './opus.js';
import { endProblem, lostNotice, microphoneProblem, obstacle, pausedNotice, queueNotice } from './problems.js';
import { Wire } from './wire.js';

/**
 * @typedef {'idle'|'opening'|'connecting'|'queued'|'preparing'|'talking'|'lost'} State
 *
 * @typedef {object} CallEvents
 * @property {(state: State, detail: number) => void} state detail: place in the queue, or number of the attempt
 * @property {(problem: import('./problems.js').Problem|null) => void} problem null: what was wrong is no more
 * @property {(again: boolean) => void} begin the model listens; again: after a lost connection
 * @property {(text: string, level: number|null) => void} text
 * @property {(data: any) => void} metadata
 * @property {(who: 'you'|'model', samples: Float32Array, at: number, rms: number) => void} block 20 ms of sound
 * @property {(report: {level: number, missed: number, underruns: number, played: number}) => void} buffer in ms
 */

export class Call {
  /**
   * @param {CallEvents & import('./meters.js').TalkEvents} on
   * @param {{query: () => object, devices: () => {microphone: string, speaker: string}}} settings
   */
  constructor(on, settings) {
    this.on = on;
    this.settings = settings;
    this.picture = null;
    this.muted = false;
    this.paused = false; // by the system, which has stopped the sound
    /** @type {import('./problems.js').Problem|null} */
    this.missing = null; // what is wrong with the microphone, during a call
    this.notice = null; // of the connection
    this.changes = 0; // of the microphone: the last one counts
    this.accepted = null; // the last picture that the server could use
    /** @type {State} */
    this.state = 'idle';
    document.addEventListener('visibilitychange', () => document.visibilityState === 'visible' && this.wake());
    addEventListener('pagehide', () => this.wire?.leave());
  }

  /** @param {State} state */
  enter(state, detail = 0) {
    this.state = state;
    this.on.state(state, detail);
  }

  get running() {
    return this.state !== 'idle';
  }

  async start() {
    this.on.problem(null);
    const hindered = obstacle();
    if (hindered) return this.on.problem(hindered);
    this.enter('opening');
    const sound = new Sound({
      mic: (block) => this.hear('you', block),
      heard: (block) => this.hear('model', block),
      buffer: (report) => this.on.buffer(report),
      unplugged: () => this.changeMicrophone(),
      running: (running) => this.flow(running),
    });
    this.sound = sound;
    this.paused = false;
    this.missing = this.notice = null;
    sound.mute(this.muted);
    try {
      const [opus] = await Promise.all([hasOpus(), sound.open(this.settings.devices())]);
      if (this.sound !== sound) return sound.close();
      this.format = opus ? 'ogg' : 'pcm';
    } catch (error) {
      if (this.sound === sound) this.end(microphoneProblem(error));
      return;
    }
    this.watch = new TalkWatch(this.on);
    this.keepAwake();
    this.connect();
  }

  connect() {
    const query = { page: 1, audio: this.format, ...this.settings.query() };
    let again = false;
    let first = null;
    this.enter('connecting');
    this.wire = new Wire(query, {
      open: () => {
        this.enter('preparing');
        first = this.picture;
        this.wire.image(first);
      },
      ready: () => {
        this.on.begin(again);
        again = true;
        this.accepted = first;
        this.talk();
        if (this.picture !== first) this.wire.image(this.picture); // changed while the server was looking
      },
      audio: (bytes) => this.receiver?.push(bytes),
      text: this.on.text,
      metadata: this.on.metadata,
      queued: (position, text) => {
        this.enter('queued', position);
        this.notice = queueNotice(position, text);
        this.complain();
      },
      lost: (attempt) => {
        this.hush();
        this.enter('lost', attempt);
        this.notice = lostNotice();
        this.complain();
      },
      end: (reason) => this.end(endProblem(reason)),
    });
    this.wire.connect();
  }

  talk() {
    this.hush();
    this.sound.reset();
    this.receiver = makeReceiver(this.format, (samples, rate) => this.sound?.play(samples, rate));
    this.sender = makeSender(this.format, (bytes) => this.wire.audio(bytes));
    this.notice = null;
    this.complain();
    this.enter('talking');
  }

  /** Say what hinders the call now, or that nothing does. */
  complain() {
    this.on.problem(this.paused ? pausedNotice() : (this.notice ?? this.missing));
  }

  /** Nothing more goes over the wire; what has arrived is played. */
  hush() {
    this.sender?.close();
    this.receiver?.close();
    this.sender = this.receiver = null;
    this.sound?.finish();
    this.watch?.stop();
  }

  /** 20 ms of one side: to the watch, the meters and the recording; the user's also to the model. */
  hear(who, { samples, at }) {
    if (!this.sound || !this.watch) return;
    const rms = loudness(samples);
    if (this.state === 'talking') {
      if (who === 'you') this.watch.hearUser(rms, at, samples.length);
      else this.watch.hearModel(rms, at, samples.length);
    }
    this.on.block(who, samples, at, rms);
    if (who === 'you') this.sender?.push(samples);
  }

  /** @param {Uint8Array|null} bytes the picture from now on, also during a call */
  show(bytes) {
    this.picture = bytes;
    if (this.state === 'talking') this.wire.image(bytes);
  }

  /** The server sees the last picture, or cannot use it: then the one before stays, whatever becomes of the line. */
  looked(usable) {
    if (usable) this.accepted = this.picture;
    else this.picture = this.accepted;
  }

  /** @param {boolean} muted */
  mute(muted) {
    this.muted = muted;
    this.sound?.mute(muted);
  }

  /** Another one was chosen, or this one was unplugged. */
  async changeMicrophone() {
    const { sound } = this;
    const change = ++this.changes;
    const problem = await this.change(() => sound.setMicrophone(this.settings.devices().microphone));
    if (!sound || this.sound !== sound || change !== this.changes) return;
    const missed = this.missing;
    this.missing = problem && { ...problem, action: 'microphone' };
    if (missed || problem) this.complain();
  }

  async changeSpeaker() {
    const problem = await this.change((sound) => sound.setSpeaker(this.settings.devices().speaker));
    if (problem) this.on.problem({ ...problem, action: undefined });
  }

  /** Devices came or went: one that was missed may be back. */
  async plugged() {
    if (this.sound && !this.sound.hears) await this.changeMicrophone();
    await this.changeSpeaker();
  }

  /** @param {(sound: Sound) => Promise<void>} work on the devices of a running call @returns what went wrong, or null */
  async change(work) {
    const { sound } = this;
    try {
      if (sound) await work(sound);
      return null;
    } catch (error) {
      return this.sound === sound ? microphoneProblem(error) : null; // hung up: it no longer matters
    }
  }

  /** The system has stopped the sound, or lets it flow again. */
  flow(running) {
    if (!running) this.sound?.wake(); // at every kind of stop: in the next one it may be allowed
    if (running === !this.paused) return;
    this.paused = !running;
    this.complain();
  }

  /** Back from another tab, the lock screen or a phone call: these take the sound, and the lock that keeps awake. */
  wake() {
    if (!this.sound) return;
    this.sound.wake();
    if (this.missing) this.changeMicrophone();
    this.keepAwake();
  }

  stop() {
    this.end(null);
  }

  /** @param {import('./problems.js').Problem|null} problem */
  end(problem) {
    this.wire?.close();
    this.hush();
    this.sound?.close();
    this.awake?.release();
    this.wire = this.sound = this.watch = this.awake = undefined;
    this.enter('idle');
    this.on.problem(problem);
  }

  /** A phone must not go to sleep during a call; where that cannot be asked for, it may. */
  async keepAwake() {
    const awake = await navigator.wakeLock?.request('screen').catch(() => undefined);
    if (!this.running) return awake?.release();
    this.awake?.release();
    this.awake = awake;
  }
}
