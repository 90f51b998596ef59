// The camera: single pictures, or one a second.

import { element } from './dom.js';
import { encode, MAX_SIDE } from './encoding.js';

/**
 * @typedef {object} CameraEvents
 * @property {() => () => boolean} choose somebody chooses a picture; the answer tells later whether it is still the last
 * @property {(picture: import('./picture.js').Picture) => void} take
 * @property {() => void} film what the camera sees is to be shown, and no more the picture that was taken
 * @property {(text: string) => void} problem
 */

export class Camera {
  /** @param {HTMLVideoElement} video @param {CameraEvents} on */
  constructor(video, on) {
    this.video = video;
    this.on = on;
    this.facing = 'environment';
    this.opening = 0; // counts them: what an earlier one brings comes too late
    this.taken = false; // the picture is looked at, not what the camera sees
    element('shoot').addEventListener('click', () => (this.taken ? this.film() : this.shoot()));
    element('flip').addEventListener('click', () => this.flip());
    element('live').addEventListener('change', () => {
      this.film();
      this.repeat();
    });
  }

  async open() {
    this.close();
    this.film();
    const { opening } = this;
    try {
      const size = { width: { ideal: MAX_SIDE }, height: { ideal: MAX_SIDE } };
      const stream = await navigator.mediaDevices.getUserMedia({ video: { ...size, facingMode: this.facing } });
      if (opening !== this.opening) return stream.getTracks().forEach((track) => track.stop());
      this.stream = stream;
      stream.getVideoTracks()[0].onended = () => this.lose(opening);
      this.video.srcObject = stream;
      await this.video.play();
      this.repeat();
    } catch (error) {
      const why = { NotAllowedError: 'Its use was refused.', NotFoundError: 'None was found.' }[error?.name];
      if (opening === this.opening) this.on.problem(`The camera cannot be used. ${why ?? ''}`);
    }
  }

  close() {
    this.opening += 1;
    clearInterval(this.timer);
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = this.video.srcObject = null;
  }

  /** It was unplugged, or taken away: what it saw last is no picture of now. */
  lose(opening) {
    if (opening !== this.opening) return;
    this.close();
    this.on.film();
    this.on.problem('The camera is gone. Choose “Camera” again when it is back.');
  }

  flip() {
    this.facing = this.facing === 'user' ? 'environment' : 'user';
    this.open();
  }

  get live() {
    return element('live').checked;
  }

  film() {
    this.show(false);
    this.on.film();
  }

  /** @param {boolean} taken */
  show(taken) {
    this.taken = taken;
    element('shoot').disabled = this.live;
    element('shoot-label').textContent = taken ? 'Take another' : 'Take a picture';
  }

  repeat() {
    clearInterval(this.timer);
    if (!this.live) return;
    this.on.choose();
    this.shoot(true);
    this.timer = setInterval(() => this.shoot(true), 1000);
  }

  /** @param {boolean} live one of many: it does not count as a choice */
  async shoot(live = false) {
    if (!this.video.videoWidth) return;
    const { opening } = this;
    const isLast = live ? () => opening === this.opening : this.on.choose();
    const blob = await encode(this.video, this.video.videoWidth, this.video.videoHeight, 'image/jpeg');
    if (!isLast()) return;
    if (!live) this.show(opening === this.opening);
    this.on.take({ blob, name: 'Picture of the camera', source: 'camera', live });
  }
}
