// One transcription with OpenAI's SDK for Node as a stream, its events and its end as one line of JSON.
//
//   VOXGATE_BASE_URL=... VOXGATE_API_KEY=... node stream.mjs AUDIO [PARAMETERS]
//
// PARAMETERS is a JSON object. Each event carries the milliseconds after which it came; `end` is null, or the
// error that the iteration ended in.
import fs from 'node:fs';
import OpenAI from 'openai';

const [audio, parameters = '{}'] = process.argv.slice(2);
const client = new OpenAI({
  baseURL: process.env.VOXGATE_BASE_URL + '/v1',
  apiKey: process.env.VOXGATE_API_KEY,
  maxRetries: 0,
});

const events = [];
let end = null;
const begun = performance.now();
try {
  const file = fs.createReadStream(audio);
  const stream = await client.audio.transcriptions.create({
    model: 'whisper-1',
    file,
    stream: true,
    ...JSON.parse(parameters),
  });
  for await (const event of stream) {
    events.push({ ...event, after: performance.now() - begun });
  }
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  const { status, code, param, type, message } = error;
  end = { name: error.constructor.name, status, code, param, type, message };
}
console.log(JSON.stringify({ events, end }));
