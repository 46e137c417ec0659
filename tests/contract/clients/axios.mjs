// One upload with axios, its status and body as one line of JSON.
//
//   VOXGATE_BASE_URL=... VOXGATE_API_KEY=... node axios.mjs AUDIO
import fs from 'node:fs';
import axios from 'axios';
import FormData from 'form-data';

const form = new FormData();
form.append('model', 'whisper-1');
form.append('file', fs.createReadStream(process.argv[2]));
const response = await axios.post(process.env.VOXGATE_BASE_URL + '/v1/audio/transcriptions', form, {
  headers: { Authorization: `Bearer ${process.env.VOXGATE_API_KEY}`, ...form.getHeaders() },
  maxBodyLength: Infinity,
  validateStatus: () => true,
});
console.log(JSON.stringify({ status: response.status, body: response.data }));
