"""A picture through OpenAI's own Python package, which knows nothing of Safelight: `pip install openai`."""

import base64
import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="the server's key, if it asks for one")

print("models:", [model.id for model in client.models.list()])
answer = client.images.generate(
    prompt="a large green triangle at the center on a purple background",
    size="128x128",
    extra_body={"seed": 3, "num_inference_steps": 16},  # the model's own fields: GET /v1/models/MODEL/schema names them
)
assert answer.data and answer.data[0].b64_json
Path("triangle.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
print("triangle.png")
