// What to tell people when something is wrong, and what they can do about it.

/**
 * @typedef {object} Problem
 * @property {string} title @property {string} text
 * @property {'error'|'notice'} [kind]
 * @property {'start'|'token'|'wake'|'microphone'|'load'} [action] that may help
 */

/** @returns {Problem|null} what makes a call impossible here */
export function obstacle() {
  if (!window.isSecureContext) {
    return {
      title: 'This address is not secure, so the browser hides the microphone',
      text:
        'Open the page as https://… (the server can make a certificate: moshivis serve --tls-self-signed), or on ' +
        `the server's own machine as http://localhost, for example through “ssh -L ${location.port || 80}:localhost:` +
        `${location.port || 80} ${location.hostname}”. Asking in writing works here too.`,
    };
  }
  if (!navigator.mediaDevices?.getUserMedia || typeof AudioWorkletNode === 'undefined') {
    return {
      title: 'This browser cannot do live sound',
      text: 'A newer Chrome, Edge, Firefox or Safari can. Asking in writing works here too.',
    };
  }
  return null;
}

/** @param {DOMException} error of getUserMedia @returns {Problem} */
export function microphoneProblem(error) {
  const known = {
    NotAllowedError: [
      'The microphone is not allowed',
      'Allow it in the browser’s address bar, or in the system’s privacy settings, and try again.',
    ],
    NotFoundError: ['There is no microphone', 'Plug one in, or choose another device in the settings.'],
    NotReadableError: ['The microphone is in use', 'Another program holds it. Close that one and try again.'],
  };
  const [title, text] = known[error.name] ?? ['The sound could not be started', error.message];
  return { title, text: `${text} You can also ask in writing.`, action: 'start' };
}

/** @param {string} text as the server writes it @returns {string} for people to read */
export function asSentence(text) {
  return text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?…]$/.test(text) ? '' : '.'}` : '';
}

/** @param {{code: string, text: string}} reason of the end of a connection @returns {Problem|null} */
export function endProblem({ code, text }) {
  const sentence = asSentence(text);
  switch (code) {
    case 'ended':
      return { kind: 'notice', title: 'The call is over', text: sentence, action: 'start' };
    case 'stopping':
      return {
        title: 'The server is stopping',
        text: 'Whoever runs it has ended it. What was said is still here and can be saved. Try again later.',
        action: 'start',
      };
    case 'token':
      return { title: 'This server asks for a token', text: sentence, action: 'token' };
    case 'refused':
      return { title: 'The server refused the call', text: sentence, action: 'start' };
    case 'lost':
      return {
        title: 'The server does not answer any more',
        text: 'Several attempts to come back have failed. What was said is still here and can be saved.',
        action: 'start',
      };
    case 'blocked':
      return {
        title: 'Sound cannot get through to the server',
        text:
          'The page loads, but its connection for sound, a WebSocket, does not open. A proxy in between may not pass ' +
          'WebSockets on, or the browser may not trust the certificate. Asking in writing works here too.',
        action: 'start',
      };
    default:
      return { title: 'The server had a problem', text: sentence, action: 'start' };
  }
}

/** @param {number} position in the queue @param {string} text the server's sentence @returns {Problem} */
export function queueNotice(position, text) {
  if (position < 1) return { kind: 'notice', title: 'The server is not ready yet', text: asSentence(text) };
  const place = position === 1 ? 'You are next' : `You are number ${position} in the queue`;
  return {
    kind: 'notice',
    title: 'All places are taken',
    text: `${place}. Leave this page open: the call begins by itself.`,
  };
}

/** @returns {Problem} */
export function pausedNotice() {
  return {
    kind: 'notice',
    title: 'The sound was interrupted',
    text: 'Another call or another program took it. The call goes on when the sound does.',
    action: 'wake',
  };
}

/** @returns {Problem} */
export function lostNotice() {
  return {
    kind: 'notice',
    title: 'The connection is lost',
    text: 'Trying to come back. The model will then begin anew; the transcript stays.',
  };
}
