// The Node example of LLMVision's page, verbatim but for the base URL and the key, which come from
// the environment. It sends `audio.mp3` of the working directory.
const { VOXGATE_BASE_URL, VOXGATE_API_KEY: YOUR_API_KEY } = process.env;

const FormData = require('form-data');
const fs = require('fs');
const axios = require('axios');
const formData = new FormData();
formData.append('file', fs.createReadStream('audio.mp3'));
formData.append('model', 'lmp-stt-20241013');
axios.post(`${VOXGATE_BASE_URL}/v1/audio/transcriptions`, formData, {
headers: {
'Authorization': `Bearer ${YOUR_API_KEY}`,
...formData.getHeaders()
}
})
.then(response => {
console.log(response.data);
})
.catch(error => {
console.error('Error:', error);
});
