const data = JSON.parse(document.getElementById('data').textContent);
const G = data.grid;
const bytes = (s) => Uint8Array.from(atob(s), (c) => c.charCodeAt(0));
function paint(id, colour) {
  const canvas = document.getElementById(id), image = new ImageData(G, G);
  canvas.width = canvas.height = G;
  for (let n = 0; n < G * G; n++) image.data.set([...colour(n), 255], 4 * n);
  canvas.getContext('2d').putImageData(image, 0, 0);
}
const blend = (a, b, t) => a.map((x, i) => Math.round(x + t * (b[i] - x)));
function show(layer, head, button) {
  const cell = data.layers[layer].heads[head], setting = data.settings[cell.setting];
  document.querySelectorAll('.map button[aria-pressed=true]').forEach((x) => x.setAttribute('aria-pressed', false));
  if (button) button.setAttribute('aria-pressed', true);
  const say = (x, digits) => x === null ? 'not known' : x.toFixed(digits);
  document.getElementById('what').textContent = `Layer ${data.layers[layer].title}, head ${head}: ${setting[0]}`;
  document.getElementById('numbers').textContent = `relative error ${say(cell.error, 4)}, mass recall `
    + `${say(cell.recall, 4)}, predicted ${say(cell.time && cell.time / 1e3, 2)} of ${say(cell.dense && cell.dense / 1e3, 2)} ms`;
  const truth = data.truth[layer];
  if (!truth) return;
  const t = bytes(truth).subarray(head * G * G), k = bytes(data.kept[layer]).subarray(head * G * G);
  paint('truth', (n) => blend([255, 255, 255], [8, 48, 107], t[n] / 255));
  paint('kept', (n) => {
    const ground = blend([255, 255, 255], [214, 228, 244], Math.sqrt(k[n] / 255));
    const inside = blend(ground, [8, 48, 107], k[n] ? t[n] / 255 : 0);
    return k[n] ? inside : blend(inside, [200, 30, 20], t[n] / 255);
  });
}
document.querySelectorAll('.map button').forEach((b) => b.addEventListener('click', () => show(+b.dataset.layer, +b.dataset.head, b)));
show(0, 0, document.querySelector('.map button'));
