// Small helpers for the page's elements.

/** @param {string} id @returns {any} */
export const element = (id) => document.getElementById(id);

/** Screen readers may say again what is written again. @param {string} id @param {string} text */
export function tell(id, text) {
  if (element(id).textContent !== text) element(id).textContent = text;
}
