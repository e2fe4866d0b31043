#!/bin/sh
# A picture from a server, with nothing but curl: first `safelight serve`, then this.
set -eu
URL=${1:-http://127.0.0.1:8000}

curl -fsS "$URL/v1/images/generations" \
  -H 'content-type: application/json' \
  -d '{"prompt": "a large red circle at the left on a white background", "seed": 7}' \
  | python3 -c 'import base64, json, sys; open("circle.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'
echo circle.png

# As a job, which goes on when the connection ends: what it is, how it goes on, and its file.
JOB=$(curl -fsS "$URL/v1/images/generations" \
  -H 'content-type: application/json' -H 'prefer: respond-async' \
  -d '{"prompt": "a small blue star at the top on a yellow background", "seed": 1}' \
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
curl -fsSN "$URL/v1/jobs/$JOB/events" | grep '^event:'
curl -fsS "$URL/v1/jobs/$JOB/content" -o star.png
echo star.png

# As an address, which opens without the server's key until its job expires: for a browser, or for somebody else.
ADDRESS=$(curl -fsS "$URL/v1/images/generations" \
  -H 'content-type: application/json' \
  -d '{"prompt": "a large green square at the right on a black background", "seed": 2, "response_format": "url"}' \
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["url"])')
curl -fsS "$ADDRESS" -o square.png
echo square.png
