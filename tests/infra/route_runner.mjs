// Runs a CloudFront Function on events: `{code, events}` on stdin, a list of outcomes on stdout.
//
// The module 'cloudfront' is a stand-in that notes the origin that was selected. As at the edge, the code has
// neither Node's globals nor any other module, and is in strict mode.
import vm from 'node:vm';
import { readFileSync } from 'node:fs';

const { code, events } = JSON.parse(readFileSync(0, 'utf8'));
const outcomes = [];

for (const event of events) {
    const context = vm.createContext({}, { codeGeneration: { strings: false, wasm: false } });
    let origin = null;
    const cloudfront = new vm.SyntheticModule(['default'], function () {
        this.setExport('default', {
            selectRequestOriginById(id, ...rest) {
                if (typeof id !== 'string' || id === '' || rest.length > 0) {
                    throw new TypeError('selectRequestOriginById takes the id of an origin');
                }
                origin = id;
            },
        });
    }, { context });
    const module = new vm.SourceTextModule(`${code}\nglobalThis.handler = handler;`, { context });
    await module.link((specifier) => {
        if (specifier !== 'cloudfront') {
            throw new Error(`there is no module ${specifier}`);
        }
        return cloudfront;
    });
    await module.evaluate();
    // The function's own copy: an answer that is the request must be the request it was given.
    const given = vm.runInContext('JSON.parse', context)(JSON.stringify(event));
    const answer = context.handler(given);
    outcomes.push({ origin, passed: answer === given.request, answer });
}
process.stdout.write(JSON.stringify(outcomes));
