// The page: brings call, picture, transcript, meters, settings and recording together.

import { canChooseSpeaker } from './audio.js';
import { Call } from './call.js';
import { element, tell } from './dom.js';
import { Meter } from './meters.js';
import { PicturePanel } from './picture.js';
import { asSentence, obstacle } from './problems.js';
import { download, Recording } from './recording.js';
import { keep, recall, Settings } from './settings.js';
import { GateCurve, gateLevel, Transcript } from './transcript.js';
import { server } from './wire.js';

const TOKEN = 'moshivis.token';
const THEME = 'moshivis.theme';
const THEMES = { '': 'as the system', light: 'light', dark: 'dark' };

const settings = new Settings(element('settings').querySelector('form'), {
  microphone: () => call.changeMicrophone(),
  speaker: () => call.changeSpeaker(),
});
const transcript = new Transcript(element('transcript'), element('spoken'));
const curve = new GateCurve(element('curve'), element('scale'));
const recording = new Recording();
const meters = {
  you: new Meter(element('meter-you')),
  model: new Meter(element('meter-model'), document.querySelector('.ring')),
};
let info = null;
let began = 0; // ms, of the call under way
let connected = 0; // ms, the same until the connection is lost
let limit = Infinity; // s after that, by the server
let reactions = [];

const call = new Call(
  {
    state: showState,
    problem: showProblem,
    begin,
    text: (text, level) => transcript.say(text, level),
    metadata,
    block: (who, samples, at, rms) => {
      meters[who].show(rms);
      if (began) recording.add(who, samples, at);
    },
    buffer: showBuffer,
    speechBegin: () => transcript.beginSpeech(),
    speechLevel: (level) => transcript.duringSpeech(level),
    speechEnd: (seconds) => transcript.endSpeech(seconds),
    reaction,
  },
  settings,
);

const picture = new PicturePanel(
  async (chosen) => {
    const turns = call.state === 'talking' && chosen && !chosen.live;
    if (turns) picture.say('The model turns to it…');
    const bytes = chosen && new Uint8Array(await chosen.blob.arrayBuffer());
    if (picture.current === chosen) call.show(bytes);
  },
  (text) => showProblem({ title: 'That did not work', text }),
);

// the call -------------------------------------------------------------------------------------------------------------

element('call').addEventListener('click', async () => {
  if (call.running) return call.stop();
  await call.start();
  settings.offerDevices();
});

element('mute').addEventListener('click', ({ currentTarget }) => {
  call.mute(!call.muted);
  currentTarget.setAttribute('aria-pressed', String(call.muted));
  if (call.state === 'talking') tell('state', STATES.talking());
});

const STATES = {
  idle: () => '',
  opening: () => 'Please allow the microphone',
  connecting: () => 'Connecting…',
  queued: (position) => (position > 0 ? `Number ${position} in the queue` : 'The server is not ready yet'),
  preparing: () => (call.picture ? 'The model looks at the picture…' : 'The model gets ready…'),
  talking: () => {
    if (limit - secondsSince(connected) < 60) return 'The call ends in less than a minute';
    return call.muted ? 'Muted: the model hears silence' : 'Talk, it listens';
  },
  lost: (attempt) => `Connection lost, attempt ${attempt} to come back`,
};

function showState(state, detail) {
  element('dock').dataset.state = state;
  tell('state', STATES[state](detail));
  element('call-label').textContent = { idle: 'Start talking', talking: 'Stop' }[state] ?? 'Cancel';
  element('clock').textContent = '';
  if (state === 'talking') return;
  picture.say('');
  if (state !== 'idle') return;
  if (began) transcript.note(`The call has ended after ${duration()}`);
  began = 0;
  Object.values(meters).forEach((meter) => meter.clear());
}

function begin(again) {
  if (again) {
    transcript.note('Connected again: the model begins anew');
  } else {
    reactions = [];
    began = performance.now();
    recording.begin();
    if (!transcript.empty) transcript.note('A new call');
    if (call.format === 'pcm') transcript.note('This browser cannot make Opus: sound travels uncompressed');
  }
  connected = performance.now();
  curve.clear();
}

const secondsSince = (time) => (performance.now() - time) / 1000;

function duration() {
  const seconds = Math.floor(secondsSince(began));
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
}

setInterval(() => {
  if (call.state !== 'talking') return;
  element('clock').textContent = duration();
  tell('state', STATES.talking());
}, 1000);

function metadata(data) {
  if (data.type === 'gate') {
    curve.add(data.values);
  } else if (data.type === 'settings') {
    limit = data.session_s ?? Infinity;
  } else if (data.type === 'stats') {
    element('fact-unheard').parentElement.hidden = !data.dropped;
    element('fact-unheard').textContent = time((data.dropped / curve.frameRate) * 1000);
  } else if (data.type === 'image') {
    const failed = data.status === 'error';
    call.looked(!failed);
    if (failed) picture.refuse();
    picture.say('');
    if (failed) showProblem({ title: 'The server cannot use this picture', text: data.message });
  }
}

function reaction(ms) {
  transcript.react(ms);
  reactions = [...reactions, ms].sort((a, b) => a - b);
  element('fact-reaction').textContent = `${(ms / 1000).toFixed(2)} s`;
  const middle = reactions[Math.floor(reactions.length / 2)];
  element('fact-reaction').title = `Median of ${reactions.length}: ${(middle / 1000).toFixed(2)} s`;
}

const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function showBuffer({ level, missed, underruns }) {
  element('fact-buffer').textContent = `${Math.round(level / 10) * 10} ms`;
  element('fact-missed').textContent = time(missed);
  element('fact-missed').title = `${underruns} times`;
}

// in writing -----------------------------------------------------------------------------------------------------------

element('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = element('question').value.trim();
  if (!text) return;
  element('question').value = '';
  ask(text);
});

async function ask(text) {
  const answer = transcript.ask(text);
  try {
    const blob = picture.current?.blob;
    const body = JSON.stringify({ text, image: blob ? await dataUri(blob) : null });
    const headers = { 'Content-Type': 'application/json' };
    const { pieces } = await (await server.fetch('api/ask', {}, { method: 'POST', headers, body })).json();
    answer(pieces.map((piece) => ({ text: piece.text, level: blob ? gateLevel(piece.gate, curve.scale) : 0 })));
  } catch (error) {
    answer(null);
    const action = error.status === 401 ? 'token' : undefined;
    showProblem({ title: 'The question could not be answered', text: error.message, action });
  }
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// what is wrong --------------------------------------------------------------------------------------------------------

const ACTIONS = {
  start: { label: 'Try again', act: () => call.running || element('call').click() },
  wake: { label: 'Go on', act: () => call.wake() },
  microphone: { label: 'Try again', act: () => call.changeMicrophone() },
  load: { label: 'Try again', act: load },
  token: { label: 'Enter the token', act: ({ text }) => askToken(text) },
};

function showProblem(problem) {
  element('problem').hidden = !problem;
  if (!problem) return;
  element('problem').dataset.kind = problem.kind ?? 'error';
  tell('problem-title', problem.title);
  tell('problem-text', problem.text);
  const action = ACTIONS[problem.action];
  element('problem-action').hidden = !action;
  tell('problem-action', action?.label ?? '');
  element('problem-action').onclick = () => {
    showProblem(null);
    action.act(problem);
  };
}

element('problem-close').addEventListener('click', () => showProblem(null));

element('token-form').addEventListener('submit', () => {
  useToken(element('token-value').value.trim());
  element('token-value').value = '';
  load();
});

/** @param {string} why by the server */
function askToken(why) {
  element('token-note').textContent = `${asSentence(why)} Whoever runs the server can tell you the token.`;
  element('token').showModal();
}

function useToken(token) {
  server.token = token;
  try {
    sessionStorage.setItem(TOKEN, token);
  } catch {
    // it lasts as long as the page
  }
}

/** From the address, which must not keep it, or from before. */
function findToken() {
  const address = new URL(location.href);
  const given = address.searchParams.get('token');
  if (given) {
    address.searchParams.delete('token');
    history.replaceState(null, '', address);
    return useToken(given);
  }
  try {
    server.token = sessionStorage.getItem(TOKEN) ?? '';
  } catch {
    // storage is switched off
  }
}

// the rest of the page -------------------------------------------------------------------------------------------------

navigator.mediaDevices?.addEventListener('devicechange', () => {
  settings.offerDevices();
  call.plugged();
});

for (const button of ['open-settings', 'open-sound']) {
  element(button).addEventListener('click', () => {
    element('settings').showModal();
    settings.offerDevices();
  });
}
element('open-help').addEventListener('click', () => element('help').showModal());
element('token-close').addEventListener('click', () => element('token').close());
for (const dialog of document.querySelectorAll('dialog')) {
  dialog.addEventListener('click', (event) => event.target === dialog && dialog.close());
}

element('theme').addEventListener('click', () => {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? '';
  showTheme(names[(names.indexOf(now) + 1) % names.length]);
});

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  keep(THEME, theme);
  element('theme').title = `Theme: ${THEMES[theme]}`;
  element('theme').setAttribute('aria-label', `Theme: ${THEMES[theme]}`);
  curve.draw();
}

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => curve.draw());

const save = (id, ending, make) =>
  element(id).addEventListener('click', () => {
    const time = new Date().toISOString().slice(0, 16).replace('T', '-').replace(':', '');
    download(make(), `moshivis-${time}${ending}`);
    element('save').open = false;
  });
save('save-mix', '.wav', () => recording.wav(false));
save('save-two', '-two-channels.wav', () => recording.wav(true));
save('save-text', '.txt', () => new Blob([transcript.toText()], { type: 'text/plain' }));
save('save-json', '.json', () => {
  const whole = { model: info?.name, saved: new Date().toISOString(), turns: transcript.toJSON() };
  return new Blob([JSON.stringify(whole, null, 2)], { type: 'application/json' });
});

element('save').addEventListener('toggle', () => {
  for (const id of ['save-mix', 'save-two']) element(id).disabled = recording.seconds === 0;
  for (const id of ['save-text', 'save-json']) element(id).disabled = transcript.empty;
});
document.addEventListener('click', (event) => {
  if (!element('save').contains(event.target)) element('save').open = false;
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') element('save').open = false;
});

async function load() {
  try {
    info = await (await server.fetch('api/info')).json();
    describeModel();
    document.querySelector('.look').hidden = !info.sees;
    picture.able = info.sees;
    if (info.sees) await picture.fill();
  } catch (error) {
    if (error.status === 401) askToken(error.message);
    else showProblem({ title: 'The server does not answer as it should', text: error.message, action: 'load' });
  }
}

function describeModel() {
  element('model').textContent = info.miniature ? 'miniature' : info.name;
  const about = info.miniature
    ? 'This server runs a miniature: a small model that comes with moshivis. It knows six shapes, eleven colours, ' +
      'places, sizes and counting, and reads printed words and numbers, in some three hundred words of English; and ' +
      'it errs. Drawn shapes are what it understands; photographs are not.'
    : `This server runs ${info.name}${info.sees ? '' : ', which cannot see: it talks without a picture'}.`;
  element('about').textContent = about;
  element('help-model').textContent = `${about} Version ${info.version}, with room for ${info.slots} calls at once.`;
  settings.setUsual(info.sampling);
  curve.frameRate = info.frame_rate;
  curve.scale = info.gate_scale;
  const buttons = info.questions.map((question) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = question;
    button.title = 'Ask this in writing';
    button.addEventListener('click', () => ask(question));
    return button;
  });
  element('examples').replaceChildren(...buttons);
}

findToken();
showTheme(recall(THEME) ?? '');
element('speaker-field').hidden = !canChooseSpeaker();
showProblem(obstacle());
load();

/** For tests and for the curious: what the page is doing. */
window.moshivis = { call, transcript, recording, picture };
