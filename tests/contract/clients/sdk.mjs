// One transcription with OpenAI's SDK for Node, its outcome as one line of JSON.
//
//   VOXGATE_BASE_URL=... VOXGATE_API_KEY=... node sdk.mjs AUDIO [PARAMETERS] [CLIENT-OPTIONS]
//
// PARAMETERS and CLIENT-OPTIONS are JSON objects. `requests` counts what went over the wire.
import fs from 'node:fs';
import OpenAI from 'openai';

const [audio, parameters = '{}', options = '{}'] = process.argv.slice(2);
let requests = 0;
const client = new OpenAI({
  baseURL: process.env.VOXGATE_BASE_URL + '/v1',
  apiKey: process.env.VOXGATE_API_KEY,
  fetch: (...call) => {
    requests += 1;
    return fetch(...call);
  },
  ...JSON.parse(options),
});

let outcome;
try {
  const file = fs.createReadStream(audio);
  const result = await client.audio.transcriptions.create({ model: 'whisper-1', file, ...JSON.parse(parameters) });
  outcome = { result };
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  const { status, code, param, type, message } = error;
  outcome = { error: { name: error.constructor.name, status, code, param, type, message } };
}
console.log(JSON.stringify({ ...outcome, requests }));
