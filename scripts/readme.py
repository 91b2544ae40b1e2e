"""README.md from nbs/index.ipynb: markdown as it stands, outputs of code cells without their code.

nbdev_readme does the same through Quarto, which not every machine has. The rooms' first pages (rooms.py) and the index
of the library (api_index.py) are made here too.
"""

import json
import re
from pathlib import Path

import api_index
import rooms

rooms.main()
api_index.main()
root = Path(__file__).resolve().parents[1]
parts = []
for cell in json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "markdown":
        parts.append("".join(cell["source"]))
    for output in cell.get("outputs", []):
        if "text/markdown" in output.get("data", {}):
            parts.append("".join(output["data"]["text/markdown"]))
text = re.sub(r"\]\(([\w/]+\.(?:ipynb|svg)(?:#[\w-]+)?)\)", r"](nbs/\1)", "\n\n".join(parts))  # seen from the top level
(root / "README.md").write_text(text + "\n", encoding="utf-8")
