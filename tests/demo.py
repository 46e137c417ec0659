"""`make demo`: start the gateway on this machine, send it real speech, show what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from pathlib import Path

SPEECH = Path(__file__).with_name("data") / "long-slt.flac"
PATH = "/v1/audio/transcriptions"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "voxgate", "serve", "--port", "0", "--data-dir", directory]
        print(f"$ voxgate serve --port 0 --data-dir {directory}")
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert server.stdout is not None
            url = ""
            for line in server.stdout:
                print(f"  {line.rstrip()}")
                if " listens at " in line:
                    url = line.split()[-1]
                if line.startswith("API key"):
                    break
            if not url:
                sys.exit("the server did not start")
            key = (Path(directory) / "api-key").read_text(encoding="ascii").strip()
            for response_format in ("verbose_json", "srt"):
                print(
                    f"\n$ curl {url}{PATH} -H 'Authorization: Bearer {key[:6]}...' \\\n"
                    f"    -F file=@tests/data/{SPEECH.name} -F model=whisper-1 -F response_format={response_format}\n"
                )
                body = post(url + PATH, key, response_format)
                print(json.dumps(json.loads(body), indent=2) if response_format == "verbose_json" else body)
        finally:
            server.terminate()
            server.wait(30)
    print("That was a real recording through the real API. `make serve` keeps the gateway running.")


def post(url: str, key: str, response_format: str) -> str:
    """A form as any client builds it, with the standard library alone."""
    boundary = uuid.uuid4().hex
    fields = {"model": "whisper-1", "response_format": response_format}
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in fields.items()]
    parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{SPEECH.name}"\r\n\r\n')
    body = "".join(parts).encode() + SPEECH.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=120) as answer:
        text: str = answer.read().decode()
    return text


if __name__ == "__main__":
    main()
