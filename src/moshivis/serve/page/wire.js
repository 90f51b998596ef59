// The WebSocket: kinds of messages, what its end means, reconnecting, and the queue of a busy server.

const KIND = { handshake: 0, audio: 1, text: 2, metadata: 4, error: 5, coloured: 7, image: 8 };
const DELAYS = [0.5, 1, 2, 4, 8, 8, 8, 8]; // s between attempts to come back
const BLOCKED = 4; // attempts
const QUEUE_POLL = 1000; // ms
const PLACE_LIVES = 90 * 1000; // ms that the server keeps a place in the queue for who does not ask
const CHECK = 2000; // ms between looks at whether anything has come
/** Checks at which nothing has moved, then the line is dead. In a call the server pings after 4 s. */
const QUIET_CHECKS = { opening: 8, looking: 30, call: 6 };
const PATIENCE = 5000; // ms for a short answer
const AGAIN = 100; // ms
const RATES = { ogg: 5000, pcm: 48000 }; // bytes of sound a second
const BUSY = 0.35; // s of sound that wait for the line: a picture must wait, too
const MAX_BEHIND = 0.7; // s, then sound is left out

/** How to ask for a short answer. */
const soon = () => ({ signal: AbortSignal.timeout(PATIENCE) });

/** Requests to this server, with the token if there is one. */
export const server = {
  token: '',

  /** @param {string} path @param {Record<string, unknown>} query @returns {URL} */
  url(path, query = {}) {
    const url = new URL(path, document.baseURI);
    for (const [name, value] of Object.entries({ ...query, token: this.token })) {
      if (value !== '' && value !== null && value !== undefined) url.searchParams.set(name, String(value));
    }
    return url;
  },

  /**
   * @param {string} path @param {Record<string, unknown>} query @param {RequestInit} options
   * @returns {Promise<Response>} a good answer
   * @throws {ServerError} with the server's own sentence
   */
  async fetch(path, query = {}, options = {}) {
    let response;
    try {
      response = await fetch(this.url(path, query), options);
    } catch {
      throw new ServerError(0, 'The server does not answer.');
    }
    if (response.ok) return response;
    const body = await response.text();
    const kind = response.headers.get('Content-Type') ?? '';
    let sentence = kind.startsWith('text/plain') ? body : '';
    if (kind.startsWith('application/json')) sentence = JSON.parse(body).error;
    throw new ServerError(response.status, sentence || `It says ${response.status} ${response.statusText}.`);
  },
};

export class ServerError extends Error {
  /** @param {number} status of HTTP, 0 without an answer @param {string} sentence for people */
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

/**
 * @typedef {object} WireEvents
 * @property {() => void} open connected; the picture may be sent
 * @property {() => void} ready the model listens
 * @property {(bytes: Uint8Array) => void} audio
 * @property {(text: string, level: number|null) => void} text level of the gate, 0 to 10
 * @property {(data: object) => void} metadata
 * @property {(position: number, text: string) => void} queued place in the queue, from 1, and the server's sentence
 * @property {(attempt: number) => void} lost the connection broke and will be tried again
 * @property {(reason: {code: string, text: string}) => void} end over for good: 'ended', 'token', 'refused', 'stopping',
 * 'lost', 'blocked', 'error'
 */

export class Wire {
  /** @param {Record<string, unknown> & {audio: 'ogg'|'pcm'}} query of each connection @param {WireEvents} on */
  constructor(query, on) {
    this.query = query;
    this.on = on;
    this.rate = RATES[query.audio];
    this.closed = false;
    this.attempt = 0;
    this.everOpened = this.answers = false;
  }

  connect() {
    const url = server.url('api/chat', { ...this.query, worker_auth_id: this.ticket });
    url.protocol = url.protocol.replace('http', 'ws');
    this.opened = this.handshaken = false;
    this.sent = this.pictureEnd = this.pictureSize = 0; // bytes
    this.lastError = '';
    this.socket = new WebSocket(url);
    this.socket.binaryType = 'arraybuffer';
    this.socket.onopen = () => {
      this.opened = this.everOpened = true;
      this.quiet = 0;
      this.on.open();
    };
    this.socket.onmessage = ({ data }) => this.receive(new Uint8Array(data));
    this.socket.onclose = (event) => this.over(event);
    this.quiet = this.unsent = 0;
    this.watching = setInterval(() => this.check(), CHECK);
  }

  /** A socket whose other end is gone without a word stays open, or opening, for minutes. */
  check() {
    const { bufferedAmount } = this.socket;
    const picture = !this.handshaken && bufferedAmount < this.unsent; // is on its way
    this.unsent = bufferedAmount;
    this.quiet = picture ? 0 : this.quiet + 1; // checks, not time: a page that sleeps makes none
    if (this.quiet < QUIET_CHECKS[this.handshaken ? 'call' : this.opened ? 'looking' : 'opening']) return;
    this.socket.onclose = this.socket.onmessage = null;
    this.socket.close();
    this.over({ code: 1006, reason: '' });
  }

  receive(message) {
    this.quiet = 0;
    const payload = message.subarray(1);
    const text = () => new TextDecoder().decode(payload);
    switch (message[0]) {
      case KIND.handshake:
        this.handshaken = true;
        this.attempt = 0;
        this.ticket = this.place = undefined;
        return this.on.ready();
      case KIND.audio:
        return this.on.audio(payload);
      case KIND.text:
        return this.on.text(text(), null);
      case KIND.coloured:
        return this.on.text(new TextDecoder().decode(payload.subarray(1)), payload[0]);
      case KIND.metadata:
        return this.on.metadata(JSON.parse(text()));
      case KIND.error:
        this.lastError = text();
    }
  }

  send(kind, payload) {
    if (this.socket?.readyState !== WebSocket.OPEN) return;
    const message = new Uint8Array(1 + payload.length);
    message[0] = kind;
    message.set(payload, 1);
    this.socket.send(message);
    this.sent += message.length;
  }

  /**
   * Sound that the line cannot take is left out: sent late, it would make late all that follows.
   * @param {Uint8Array} bytes
   */
  audio(bytes) {
    if (this.handshaken && this.soundBehind < MAX_BEHIND * this.rate) this.send(KIND.audio, bytes);
  }

  /** Bytes of sound that wait for the line; what is left of a picture does not count. */
  get soundBehind() {
    const waiting = this.socket.bufferedAmount;
    const picture = this.pictureEnd - (this.sent - waiting);
    return waiting - Math.min(Math.max(picture, 0), this.pictureSize);
  }

  /** @param {Uint8Array|null} bytes of an encoded picture, null for none; the latest one goes out when the line is free */
  image(bytes) {
    this.picture = bytes ?? new Uint8Array(0);
    this.sendPicture();
  }

  sendPicture() {
    clearTimeout(this.waiting);
    if (this.socket?.bufferedAmount > BUSY * this.rate) {
      this.waiting = setTimeout(() => this.sendPicture(), AGAIN);
    } else {
      this.send(KIND.image, this.picture);
      [this.pictureSize, this.pictureEnd] = [this.picture.length, this.sent];
    }
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    clearTimeout(this.waiting);
    clearInterval(this.watching);
    this.socket?.close(1000);
    this.leave();
  }

  /** Give a place in the queue back; also while the page is being closed. */
  leave() {
    if (this.place) navigator.sendBeacon(server.url('api/leave', this.place));
    this.place = undefined;
  }

  async over({ code, reason }) {
    if (this.closed) return;
    clearTimeout(this.waiting);
    clearInterval(this.watching);
    const text = this.lastError || reason;
    if (code === 1013) return this.queue(text);
    if (code === 1012 || code === 1001) return this.finish('stopping', text);
    if (code === 1008 || code === 1009 || code === 1003) return this.finish('refused', text);
    if (code === 1000) return this.finish('ended', text);
    if (code === 1011) return this.finish('error', text);
    if (this.opened) this.on.lost(this.attempt + 1);
    await this.explain();
  }

  /** The connection broke or was refused; a browser does not tell why, but the server may. */
  async explain() {
    this.answers = false;
    try {
      // By POST, as a browser names the page's origin only then, and by it the server may have refused.
      const info = await (await server.fetch('api/info', {}, { method: 'POST', ...soon() })).json();
      if (!info.accepting) return this.finish('stopping', '');
      this.answers = true;
    } catch (error) {
      if (error.status === 401) return this.finish('token', error.message);
      if (error.status === 403) return this.finish('refused', error.message);
    }
    if (!this.closed) this.retry();
  }

  retry() {
    const blocked = this.answers && !this.everOpened; // the server is there, but no socket has ever come through
    if (this.attempt === (blocked ? BLOCKED : DELAYS.length)) return this.finish(blocked ? 'blocked' : 'lost', '');
    const delay = DELAYS[this.attempt++];
    this.on.lost(this.attempt);
    this.timer = setTimeout(() => this.connect(), delay * 1000);
  }

  /** No place is free: wait for one, asking now and then, and enter. @param {string} text the server's sentence */
  async queue(text) {
    const refused = this.ticket !== undefined; // in spite of a place: the server is not ready, and needs a moment
    this.ticket = undefined;
    try {
      this.place ??= await (await server.fetch('api/add_user', { queue_id: 'page' }, soon())).json();
      if (this.closed) return this.leave();
      await this.wait(text, refused ? 0 : 1);
    } catch (error) {
      if (this.closed) return;
      this.leave();
      if (error.status === 404) return this.queue(text); // the place expired while the page slept
      if ([0, 502, 504].includes(error.status)) return this.retry();
      this.finish('refused', error.message || text);
    }
  }

  /** Ask for the place until its turn has come; it is kept while the server does not answer. */
  async wait(text, polls) {
    const { place } = this;
    let told;
    for (let answered = Date.now(); !this.closed; polls++) {
      try {
        const answer = await (await server.fetch('api/check_user', place, soon())).json();
        if (this.closed) return;
        answered = Date.now();
        if (answer.status === 'ready' && polls > 0) {
          this.ticket = answer.worker_auth_id;
          return this.connect();
        }
        const position = Number(answer.current_position);
        if (position !== told) this.on.queued(position, text);
        told = position;
      } catch (error) {
        const refused = error.status >= 400 && error.status < 500;
        if (refused || Date.now() - answered > PLACE_LIVES) throw error;
      }
      await new Promise((resolve) => (this.timer = setTimeout(resolve, QUEUE_POLL)));
    }
  }

  finish(code, text) {
    if (this.closed) return;
    this.close();
    this.on.end({ code, text });
  }
}
