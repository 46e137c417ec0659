// Lints texts by eslint.config.mjs: a list of them on stdin, a list of lists of messages on stdout.
import { readFileSync } from 'node:fs';
import { ESLint } from 'eslint';

const eslint = new ESLint({ cwd: import.meta.dirname });
const found = [];
for (const text of JSON.parse(readFileSync(0, 'utf8'))) {
    const [result] = await eslint.lintText(text, { filePath: 'route.js' });
    found.push(result.messages.map((message) => message.message));
}
process.stdout.write(JSON.stringify(found));
