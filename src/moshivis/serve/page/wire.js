// The WebSocket: kinds of messages, what its end means, reconnecting, and the queue of a busy server.

const KIND = { handshake: 0, audio: 1, text: 2, metadata: 4, error: 5, coloured: 7, image: 8 };
const DELAYS = [0.5, 1, 2, 4, 8, 8, 8, 8]; // s between attempts to come back
const BLOCKED = 4; // attempts
const QUEUE_POLL = 1000; // ms
const CHECK = 2000; // ms between looks at whether anything has come
const QUIET_CHECKS = 6; // without a message, then the line is dead: the server pings after 4 s
const EXPLAIN = 5000; // ms
const BUSY = 2 ** 14; // bytes that wait for the line: more than sound, so a picture is still on its way
const AGAIN = 100; // ms
const MAX_BEHIND = 2 ** 15; // bytes of sound

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
  /** @param {() => Record<string, unknown>} query of each connection @param {WireEvents} on */
  constructor(query, on) {
    this.query = query;
    this.on = on;
    this.closed = false;
    this.attempt = 0;
    this.everOpened = this.answers = false;
  }

  connect() {
    const url = server.url('api/chat', { ...this.query(), worker_auth_id: this.ticket });
    url.protocol = url.protocol.replace('http', 'ws');
    this.opened = this.handshaken = false;
    this.sent = this.pictureEnd = this.pictureSize = 0; // bytes
    this.lastError = '';
    this.socket = new WebSocket(url);
    this.socket.binaryType = 'arraybuffer';
    this.socket.onopen = () => {
      this.opened = this.everOpened = true;
      this.on.open();
    };
    this.socket.onmessage = ({ data }) => this.receive(new Uint8Array(data));
    this.socket.onclose = (event) => this.over(event);
  }

  /** A socket whose other end is gone without a word stays open for minutes. */
  watch() {
    clearInterval(this.watching);
    this.quiet = 0; // checks, not time: a page that sleeps makes none
    this.watching = setInterval(() => {
      if (++this.quiet < QUIET_CHECKS) return;
      this.socket.onclose = this.socket.onmessage = null;
      this.socket.close();
      this.over({ code: 1006, reason: '' });
    }, CHECK);
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
        this.watch();
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
    if (this.handshaken && this.soundBehind < MAX_BEHIND) this.send(KIND.audio, bytes);
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
    if (this.socket?.bufferedAmount > BUSY) {
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
    if (this.place) navigator.sendBeacon(server.url('api/leave', { session_auth_id: this.place }));
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
      const options = { method: 'POST', signal: AbortSignal.timeout(EXPLAIN) };
      const info = await (await server.fetch('api/info', {}, options)).json();
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

  /** No place is free: wait for one, asking now and then, and enter. */
  async queue(text) {
    const again = this.ticket !== undefined; // had a place, and was refused still: the server is not ready
    this.ticket = undefined;
    try {
      const user = await (await server.fetch('api/add_user', { queue_id: 'page' })).json();
      this.place = user.session_auth_id;
      if (this.closed) return this.leave();
      for (let polls = again ? 0 : 1; !this.closed; polls++) {
        const answer = await (await server.fetch('api/check_user', user)).json();
        if (this.closed) return;
        if (answer.status === 'ready' && polls > 0) {
          this.ticket = answer.worker_auth_id;
          return this.connect();
        }
        this.on.queued(Number(answer.current_position), text);
        await new Promise((resolve) => (this.timer = setTimeout(resolve, QUEUE_POLL)));
      }
    } catch (error) {
      if (this.closed) return;
      if (error.status === 404) return this.queue(text); // the place expired while the page slept
      if (error.status === 0) return this.retry();
      this.finish('refused', error.message || text);
    }
  }

  finish(code, text) {
    if (this.closed) return;
    this.close();
    this.on.end({ code, text });
  }
}
