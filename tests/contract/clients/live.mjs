// One session on the live WebSocket with the package ws, what came of it as one line of JSON.
//
//   VOXGATE_BASE_URL=... VOXGATE_API_KEY=... node live.mjs PCM [header|subprotocol]
//
// PCM is 16 kHz, 16 bits, mono, without a header. `refused` is the answer of a server that does not upgrade.
import fs from 'node:fs';
import WebSocket from 'ws';

const [path, how = 'header'] = process.argv.slice(2);
const { VOXGATE_BASE_URL, VOXGATE_API_KEY: key } = process.env;
const url = VOXGATE_BASE_URL.replace(/^http/, 'ws') + '/v1/stt/stream?model_id=whisper-1';
const socket =
  how === 'header'
    ? new WebSocket(url, { headers: { Authorization: `Bearer ${key}` } })
    : new WebSocket(url, ['voxgate.key', key]);

const events = [];
socket.on('open', async () => {
  // The stream's pieces are 64 KiB, cut up into tenths of a second.
  for await (const piece of fs.createReadStream(path)) {
    for (let start = 0; start < piece.length; start += 3200) socket.send(piece.subarray(start, start + 3200));
  }
  socket.send(JSON.stringify({ type: 'close' }));
});
socket.on('message', (data, isBinary) => events.push(isBinary ? { type: 'binary' } : JSON.parse(data)));
socket.on('close', (code, reason) => {
  const { protocol, extensions } = socket;
  console.log(JSON.stringify({ events, code, reason: reason.toString(), protocol, extensions }));
});
socket.on('unexpected-response', async (request, response) => {
  let body = '';
  for await (const piece of response) body += piece;
  console.log(JSON.stringify({ refused: { status: response.statusCode, headers: response.headers, body } }));
  process.exit();
});
