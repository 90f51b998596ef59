// Pictures encoded, and made small enough to be sent.

export const MAX_SIDE = 1024; // pixels; more would only be scaled down on the server
const MAX_BYTES = 4 * 2 ** 20; // of a file that is sent as it is
const AS_IT_IS = ['image/png', 'image/jpeg', 'image/webp'];

/** The file as it is if that is small enough, else scaled down. @param {File} file @returns {Promise<Blob>} */
export async function shrink(file) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = bitmap;
  const small = Math.max(width, height) <= MAX_SIDE && file.size <= MAX_BYTES && AS_IT_IS.includes(file.type);
  const type = file.type === 'image/png' ? 'image/png' : 'image/jpeg';
  const blob = small ? file : await encode(bitmap, width, height, type);
  bitmap.close();
  return blob;
}

/** What the source shows now, however long the encoding takes. @returns {Promise<Blob>} */
export function encode(source, width, height, type) {
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const pen = canvas.getContext('2d');
  pen.imageSmoothingQuality = 'high';
  pen.fillStyle = '#fff'; // under what is transparent
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(source, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error('no picture'))), type, 0.9);
  });
}
