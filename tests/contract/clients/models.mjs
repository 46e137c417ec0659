// The ids of the models that OpenAI's SDK for Node lists, and the one it retrieves, as JSON.
//
//   VOXGATE_BASE_URL=... VOXGATE_API_KEY=... node models.mjs ID
import OpenAI from 'openai';

const client = new OpenAI({ baseURL: process.env.VOXGATE_BASE_URL + '/v1', apiKey: process.env.VOXGATE_API_KEY });
const listed = [];
for await (const model of client.models.list()) listed.push(model.id);
console.log(JSON.stringify({ listed, retrieved: await client.models.retrieve(process.argv[2]) }));
