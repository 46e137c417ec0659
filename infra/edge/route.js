// CloudFront Function (runtime 2.0, viewer request): which origin takes an upload, by its length.
//
// The default origin is API Gateway, whose Lambda takes what fits in an event; the streaming ingress takes
// the rest. The function sees no body, so `Content-Length` is all there is to go by. Other requests, CORS
// preflights among them, pass as they are; the WebSocket path has a behaviour without this function.
//
// Event, response and helper: https://docs.aws.amazon.com/AmazonCloudFront/latest/DeveloperGuide/
// functions-event-structure.html, helper-functions-origin-modification.html.
// The constants are filled in when the stack is synthesized.
import cf from 'cloudfront';

const CUT = __CUT__; // bytes of a body that the default origin takes
const LARGEST = __LARGEST__; // bytes of a body that anything takes
const INGRESS = __INGRESS__; // the ingress origin's id; '' where there is none

// The paths that take audio, and the form field that it is in.
const UPLOADS = {
    '/v1/audio/transcriptions': 'file',
    '/v1/audio/translations': 'file',
    '/v1/stt/transcribe': 'audio',
    '/audio/transcriptions': 'file',
    '/litellm/v1/audio/transcriptions': 'file',
};

function handler(event) {
    const request = event.request;
    const path = request.uri.replace(/\/+$/, '');
    if (request.method !== 'POST' || !Object.prototype.hasOwnProperty.call(UPLOADS, path)) {
        return request;
    }
    const length = contentLength(request.headers);
    if (length !== null && length > LARGEST) {
        return tooLarge(event, UPLOADS[path], length, LARGEST);
    }
    if (length !== null && length <= CUT) {
        return request;
    }
    if (INGRESS !== '') {
        cf.selectRequestOriginById(INGRESS);
        return request;
    }
    if (length === null) {
        return refusal(event, 411, 'Length Required', null,
            'This API takes no upload of unknown length: send it with one Content-Length header, and not chunked.');
    }
    return tooLarge(event, UPLOADS[path], length, CUT);
}

// Bytes, or null where the headers do not say. RFC 9112, 6.3: `Transfer-Encoding` overrides it, and a list
// of equal values may be taken for one of them.
function contentLength(headers) {
    if (values(headers, 'transfer-encoding').length > 0) {
        return null;
    }
    const given = values(headers, 'content-length');
    for (let i = 0; i < given.length; i++) {
        if (!/^[0-9]+$/.test(given[i]) || Number(given[i]) !== Number(given[0])) {
            return null;
        }
    }
    return given.length > 0 ? Number(given[0]) : null;
}

// Every value of a header, whether it came as a list, as several lines, or as both.
function values(headers, name) {
    const found = [];
    Object.keys(headers).forEach((key) => {
        if (key.toLowerCase() === name) {
            const lines = headers[key].multiValue || [headers[key]];
            lines.forEach((line) => line.value.split(',').forEach((value) => found.push(value.trim())));
        }
    });
    return found;
}

function tooLarge(event, field, length, limit) {
    return refusal(event, 413, 'Content Too Large', field,
        `Maximum content size limit (${limit}) exceeded (${length} bytes announced): `
        + 'send a shorter recording, or a compressed one.');
}

function refusal(event, status, description, param, message) {
    const error = { message: message, type: 'invalid_request_error', param: param, code: 'invalid_input' };
    return {
        statusCode: status,
        statusDescription: description,
        headers: {
            'content-type': { value: 'application/json' },
            'x-request-id': { value: event.context.requestId },
        },
        body: { encoding: 'text', data: JSON.stringify({ error: error }) },
    };
}
