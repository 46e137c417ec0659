// The language of CloudFront Functions' JavaScript runtime 2.0, as a list of what is allowed: ES 5.1 with
// const, let, template literals, arrow functions, rest parameters, ** and async/await, and nothing else.
// https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/functions-javascript-runtime-20.html

const ALLOWED = new Set([
    'Program', 'ImportDeclaration', 'ImportDefaultSpecifier', 'FunctionDeclaration', 'FunctionExpression',
    'ArrowFunctionExpression', 'RestElement', 'VariableDeclaration', 'VariableDeclarator', 'Identifier', 'Literal',
    'TemplateLiteral', 'TemplateElement', 'BlockStatement', 'EmptyStatement', 'ExpressionStatement', 'IfStatement',
    'ForStatement', 'ForInStatement', 'WhileStatement', 'DoWhileStatement', 'BreakStatement', 'ContinueStatement',
    'LabeledStatement', 'SwitchStatement', 'SwitchCase', 'ReturnStatement', 'ThrowStatement', 'TryStatement',
    'CatchClause', 'ArrayExpression', 'ObjectExpression', 'Property', 'MemberExpression', 'CallExpression',
    'NewExpression', 'ThisExpression', 'UnaryExpression', 'UpdateExpression', 'BinaryExpression', 'LogicalExpression',
    'AssignmentExpression', 'ConditionalExpression', 'SequenceExpression', 'AwaitExpression',
]);
const NEWER = { // within an allowed node, what is not allowed
    ImportDeclaration: (node) => !['cloudfront', 'crypto', 'querystring', 'buffer'].includes(node.source.value),
    Property: (node) => node.shorthand || node.computed || node.method,
    LogicalExpression: (node) => node.operator === '??',
    AssignmentExpression: (node) => ['&&=', '||=', '??='].includes(node.operator),
    CatchClause: (node) => node.param === null,
    RestElement: (node) => node.parent.type === 'ArrayPattern' || node.parent.type === 'ObjectPattern',
    FunctionDeclaration: (node) => node.generator,
    FunctionExpression: (node) => node.generator || node.async,
    ArrowFunctionExpression: (node) => node.async,
    Literal: (node) => typeof node.value === 'bigint' || Boolean(node.regex && /[^gim]/.test(node.regex.flags)),
};
const runtime = {
    meta: { type: 'problem', schema: [] },
    create: (context) => ({
        '*'(node) {
            if (!ALLOWED.has(node.type) || (NEWER[node.type] && NEWER[node.type](node))) {
                context.report({ node, message: `${node.type} is not in runtime 2.0's language as written.` });
            }
        },
    }),
};
// Neither the network, timers and files, nor code made at run time (`eval`, `Function`) are there.
const GLOBALS = [
    'Object', 'Array', 'String', 'Number', 'Boolean', 'RegExp', 'Date', 'Math', 'JSON', 'Error', 'TypeError',
    'RangeError', 'SyntaxError', 'URIError', 'Promise', 'Symbol', 'Map', 'Set', 'NaN', 'Infinity', 'undefined',
    'isNaN', 'isFinite', 'parseInt', 'parseFloat', 'encodeURI', 'encodeURIComponent', 'decodeURI',
    'decodeURIComponent', 'atob', 'btoa', 'console', 'Buffer', 'TextEncoder', 'TextDecoder',
];

export default [{
    files: ['**/*.js'],
    languageOptions: {
        ecmaVersion: 'latest', // parsed as such, so that what is too new is named and not only a syntax error
        sourceType: 'module',
        globals: {
            // What ESLint would know by itself, taken away, and what the runtime has, given back.
            ...Object.fromEntries(Object.getOwnPropertyNames(globalThis).map((name) => [name, 'off'])),
            ...Object.fromEntries(GLOBALS.map((name) => [name, 'readonly'])),
        },
    },
    linterOptions: { reportUnusedDisableDirectives: 'error', noInlineConfig: true },
    plugins: { cloudfront: { rules: { runtime } } },
    rules: {
        'cloudfront/runtime': 'error',
        'no-undef': 'error',
        'no-unused-vars': ['error', { varsIgnorePattern: '^handler$' }],
        'no-eval': 'error',
        'no-new-func': 'error',
        'no-const-assign': 'error',
        'no-redeclare': 'error',
        'no-var': 'error',
        'prefer-const': 'error',
        eqeqeq: 'error',
    },
}];
