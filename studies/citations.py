"""From paper to code: every citation in the comments, with the function it stands in; and the files in reading order.

A comment that cites a paper stands where that paper's idea is, and a file's first line says what it is about: so neither
map need be kept by hand, or can be out of date. Both stand in the README, where `cog` puts them, and what else of it a
command can print; a test compares.

Run:   python citations.py
       cog -r README.md

You should see:  two tables, a row a file and a row a paper.

Read next: any row
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

from evaluation.pages import markdown
from training.files import HERE

TITLES = {
    "2601.03468": "Understanding Reward Hacking in T2I RL (ArtifactReward)",
    "2505.00703": "T2I-R1, BiCoT-GRPO",
    "2511.20256": "The Image as Its Own Reward (Adv-GRPO)",
    "2402.03300": "DeepSeekMath (GRPO)",
    "2503.20783": "Dr.GRPO",
    "2304.06767": "RAFT",
    "2501.17811": "Janus-Pro",
    "2305.03495": "ProTeGi",
    "2210.10760": "Scaling laws for reward over-optimization",
    "2306.09341": "HPS v2",
    "2305.01569": "PickScore",
    "2304.05977": "ImageReward",
    "2305.13301": "DDPO",
    "2303.05499": "GroundingDINO",
    "2205.14100": "GIT",
    "2204.08958": "MANIQA",
    "2501.11561": "DeQA-Score",
    "2503.05236": "UnifiedReward",
    "2404.01291": "VQAScore",
    "2310.02743": "Reward model ensembles (Coste et al.)",
    "2401.05675": "Parrot (Pareto)",
    "2310.04373": "Constrained RLHF",
    "2106.09685": "LoRA",
    "2104.14294": "DINO",
    "2111.07832": "iBOT",
    "2304.07193": "DINOv2",
    "2503.07265": "WISE",
}


def place(tree, line):
    """The innermost class or function around a line, as Class.function; "" for the file's header."""
    found = ""
    for node in ast.iter_child_nodes(tree):
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and node.lineno <= line <= node.end_lineno
        ):
            inner = place(node, line)
            found = f"{node.name}.{inner}" if inner else node.name
    return found


def citations():
    """paper -> the places that cite it, in the order of the files."""
    places = defaultdict(list)
    for path in sorted(Path(HERE).glob("*.py")):
        if path.name == Path(__file__).name:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for paper in re.findall(r"arXiv:(\d{4}\.\d{5})", line):
                where = f"`{path.name}`" + (f" {name}" if (name := place(tree, number)) else "")
                if where not in places[paper]:
                    places[paper].append(where)
    return places


READING = """files generate rewards artifact_reward grpo evaluate hacking report apo bandits adversarial_reward painters contest
    tiny tiny_train tiny_rewards tiny_dino harness scale explain exercises alignment_rewards vlm_rewards maniqa serving layouts
    wise bench citations""".split()
PACE = 20  # lines a minute: code whose every line is meant, with its comments


def reading_order():
    rows = []
    for name in READING:
        text = (HERE / f"{name}.py").read_text(encoding="utf-8")
        about = ast.get_docstring(ast.parse(text)).splitlines()[0]
        rows.append(
            {
                "file": f"`{name}.py`",
                "what": about,
                "minutes": max(1, round(len(text.splitlines()) / PACE)),
            }
        )
    return markdown(rows)


def table():
    rows = [
        {"paper": f"{TITLES[paper]}, arXiv:{paper}", "where": ", ".join(where)}
        for paper, where in sorted(
            citations().items(), key=lambda entry: list(TITLES).index(entry[0])
        )
    ]
    return markdown(rows)


if __name__ == "__main__":
    print("\n".join([*reading_order(), "", *table()]))
