// Runs before the first paint, so that a chosen theme does not flash. An ordinary script on purpose.
try {
  const theme = JSON.parse(localStorage.getItem('moshivis.theme'));
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // storage is switched off: the system's theme it is
}
