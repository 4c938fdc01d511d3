"""The README: its code runs, what it says can be copied can be, and what it names exists."""

import ast
import importlib
import json
import pickle
import re
import shutil
import subprocess
from fnmatch import filter as matching
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, command, random_images, random_model, read_json, succeed, words

import data
import evaluate
import sspnet
import train

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
PAPER = (TESTS / "pages/paper.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(f"tests/pages/{file.name}" for file in sorted(TESTS.glob("pages/*.md")))]
COPYING = PAPER.split("\n## What to copy\n")[1].split("\n## ")[0]
COPIES = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", COPYING, re.MULTILINE)  # part, what it needs
WORN = {  # as they are labelled
    "090004.jpg": {"Backpack", "Trousers", "LongSleeve"},
    "090014.jpg": {"Female", "Skirt&Dress", "LongSleeve"},
    "090378.jpg": {"Hat", "Female", "Trousers"},
}
USES = {
    "FPN": "FPN([2, 2, 2, 2], 8)([torch.zeros(1, 2, n, n) for n in (8, 4, 2, 1)])",
    "AFSS": "a = AFSS(['head']); a.update(torch.zeros(3, 2, 1), torch.eye(2)[:, :1]); a.select()",
    "OffsetSampling": "OffsetSampling(8)(torch.zeros(1, 8, 4, 4), torch.zeros(1, 5, 2))",
    "PLE_R": "PLE_R()(torch.zeros(1, 8, 16, 12), 'head')",
    "PLE_S": "PLE_S(8)(torch.zeros(1, 8, 16, 12), 'head')",
    "PLE_K": "PLE_K(8)(torch.zeros(1, 8, 16, 12), 'head', torch.zeros(1, 16, 2))",
    "HierarchicalLoss": "HierarchicalLoss(['head', 'all'], torch.ones(2) / 2)"
    "(torch.zeros(3, 4, 2), torch.ones(4, 2)).backward",
    "response_maps": "assert response_maps(MODEL, torch.ones(1, 3, 8, 8), [1])[1][1].sum() == 1",
    "to_image": "to_image(torch.rand(2, 4, 3), 4, False, (16, 12), (32, 24))",
    "heatmap_to_box": "assert heatmap_to_box(torch.eye(4)) == (0, 0, 4, 4)",
    "box_iou": "assert box_iou((0, 0, 2, 2), (0, 0, 2, 1)) == 0.5",
    "pyramid_pool": "assert pyramid_pool(torch.zeros(1, 8, 4, 4)).shape == (1, 40)",
    "simcc_loss": "simcc_loss(*torch.zeros(2, 1, 16, 44), torch.ones(1, 16, 2))",
    "simcc_decode": "simcc_decode(torch.zeros(1, 16, 8), torch.zeros(1, 16, 9))",
    "grad_cam": "assert grad_cam(torch.ones(1, 8, 4, 4), torch.ones(1, 8, 4, 4)).mean() == 8",
}


class Model(torch.nn.Module):
    """What `response_maps` needs of a model: an image's channels are its attributes."""

    def features(self, images):
        return [images]

    def attribute_logits(self, maps, keypoints=None):
        return list(maps[0].mean((2, 3)).unbind(1))

    def map_of(self, attribute):
        return 0


def code_of(names):
    """The source of top-level names of sspnet.py."""
    source, parts = Path(sspnet.__file__).read_text(), []
    for node in ast.parse(source).body:
        named = {getattr(node, "name", None)}
        named |= {target.id for target in getattr(node, "targets", ())}
        if named & set(names):
            parts.append(ast.get_source_segment(source, node))
    return "\n".join(parts)


def test_the_readme_lists_what_can_be_copied_and_sspnet_imports_nothing_of_the_project():
    assert {name for name, _ in COPIES} == set(USES)
    imports = re.findall(r"^(?:import|from) (\w+)", Path(sspnet.__file__).read_text(), re.MULTILINE)
    assert set(imports) == {"contextlib", "torch", "torchvision"}


@pytest.mark.parametrize("name, needs", COPIES)
def test_copied_code_works_with_torch_alone(name, needs):
    alone = {"torch": torch, "F": F, "nn": torch.nn, "MODEL": Model().eval()}
    exec(code_of([name, *re.findall(r"`(\w+)`", needs)]), alone)
    exec(USES[name], alone)


BLOCKS = re.findall(r"^```python\n(.*?)^```", README + PAPER, re.MULTILINE | re.DOTALL)


def test_its_first_commands_name_what_three_people_wear(tmp_path):
    """The published models, K with the keypoints of the published SimCC."""
    lines = re.findall(r"^python (localize\.py .*people\S*?)(?: +#.*)?$", README, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        file, *options = [TESTS.parent / w if w.startswith(".") else w for w in words(line)]
        succeed(file, *options, *words("--out panels --json found.json"))
        found = {}
        for photo in read_json("found.json")["photos"]:
            probabilities = photo["probabilities"]
            found[Path(photo["image"]).name] = {a for a, p in probabilities.items() if p > 0.5}
        assert found.keys() == WORN.keys()
        for name, worn in WORN.items():
            assert worn <= found[name], name
        assert len(list((tmp_path / "panels").iterdir())) == 3


@pytest.fixture
def quick_start(trained, tmp_path):
    """A model where the quick start leaves it."""
    (tmp_path / "runs/synthetic-S").mkdir(parents=True)
    shutil.copy(trained["S"], tmp_path / "runs/synthetic-S")


def test_its_python_runs(quick_start, tmp_path):
    """The blocks in their order, in one namespace."""
    random_images(tmp_path, ["photo.jpg"])
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        exec(block, names)
    assert len(BLOCKS) == 3
    assert names["probabilities"].shape == (1, 26)
    assert set(names["found"]) == {"attribute", "probability", "box"}
    assert names["logits"].shape == (3, 2, 5)
    assert (tmp_path / "average.png").exists()


class PooledBackbone(torch.nn.Module):
    """As the README asks for, and exported in seconds."""

    out_channels = [3, 3, 3, 3]

    def forward(self, images):
        return [F.avg_pool2d(images, stride) for stride in (4, 8, 16, 32)]


@pytest.mark.parametrize("ple", ["none", "K", "published"])  # an S, which pools as R does
def test_onnx_files_agree_with_torch_for_any_batch(ple):
    """In ONNX Runtime."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = random_model("none", "thin")
    config = {"size": [64, 48], "ple": ple, "attributes": ["a", "b"]}
    if ple == "published":
        model, published = evaluate.load_model(TESTS.parent / ".weights/pa100k-S.pt")
        config = {key: published[key] for key in config}
    elif ple != "none":
        model = sspnet.SSPNet(["head", "all"], ple, PooledBackbone(), channels=8)
    evaluate.export_onnx(model.eval(), config, "model.onnx")
    session = runtime.InferenceSession("model.onnx")
    inputs = [x.name for x in session.get_inputs()]
    assert inputs == ["images", "keypoints"][: 2 if ple == "K" else 1]
    given = (torch.randn(5, 3, *config["size"]), torch.rand(5, 16, 2) * 48)[: len(inputs)]
    values = [tensor.numpy() for tensor in given]
    (found,) = session.run(["logits"], dict(zip(inputs, values, strict=True)))
    told = session.get_modelmeta().custom_metadata_map
    for key, value in {**config, "mean": data.MEAN, "std": data.STD}.items():
        assert key == "ple" or json.loads(told[key]) == value
    with torch.inference_mode():
        expected = model(*given)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["train", "evaluate", "localize", "data"])
def test_help_has_three_examples_that_run_and_every_default(request, monkeypatch, tmp_path, name):
    printed = command(f"{name}.py", "--help").stdout.split("\n\n")
    assert printed[1].strip().endswith((".", ")."))
    examples = re.findall(rf"^ +python ({name}\.py .+?)(?:   .*)?$", printed[2], re.MULTILINE)
    assert len(examples) == 3
    options = re.split(r"\n  (?=--)", printed[-1])[1:]
    assert [option for option in options if "default" not in option] == []
    if name in ("evaluate", "localize"):
        request.getfixturevalue("quick_start")
    short = {"train": TINY, "data": words("--images 1")}.get(name, words("--images 8"))
    random_images(tmp_path, ["photo.jpg"])
    for example in examples:
        file, *options = words(example)
        succeed(file, *([] if "photo.jpg" in options else short), *options)


def rows(title):
    """The cells of the tables under a title of paper.md, without their headings."""
    lines = PAPER.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()
    lines = [line for line in lines if re.match(r"\| (?!(the )?paper \|)", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def exists(name):
    """Whether a `name` is a command's flag, a file's, or a name in the code."""
    file, _, rest = name.partition(" ")
    if rest:
        return rest in (TESTS.parent / file).read_text()
    if name.startswith("--"):
        return f'"{name}"' in Path(train.__file__).read_text()
    parts, module = name.split("."), sspnet
    if parts[0] in ("data", "train", "evaluate", "localize"):
        module = importlib.import_module(parts.pop(0))
    for part in parts:
        module = getattr(module, part, None)
    return module is not None


def test_what_the_tables_of_paper_md_name_exists():
    defined = []
    for file in TESTS.glob("test_*.py"):
        defined += re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    for _, code, tests in rows("From the paper to the code"):
        for pattern in re.findall(r"`([^`]+)`", tests) or [""]:
            assert matching(defined, pattern), code
    of_code = [row[1] for row in rows("From the paper to the code")]
    assert len(rows("Where the paper leaves room")) > 40
    for code in of_code + [row[2] for row in rows("Where the paper leaves room")]:
        for name in re.findall(r"`([^`]+)`", code) or ["none"]:
            assert exists(name), code
    picture = (TESTS.parent / ".pictures/model.svg").read_text()
    names = set(re.findall(r'class="name"[^>]*>(\w+)<', picture)) - {"P1", "P2", "P3"}
    assert len(names) == 10
    assert [name for name in names if not exists(name)] == []


def anchors(file):
    """What may follow "#" in a link to a Markdown file: its headings as GitHub spells them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_into_the_project_lead_somewhere(page):
    page = TESTS.parent / page
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        file = page.parent / file if file else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_its_line_makes_json_of_upars_pickle(tmp_path):
    text = (TESTS / "pages/datasets.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -c .*pickle.*$", text, re.MULTILINE)
    content = {"image_name": ["a.png"], "label": np.eye(2)[:1], "attr_name": ["a", "b"]}
    content["partition"] = {"test": [[np.zeros(1)]]}
    (tmp_path / "dataset_all.pkl").write_bytes(pickle.dumps(content))
    subprocess.run(line, shell=True, check=True)
    found = read_json("dataset_all.json")
    assert found["label"] == [[1, 0]]
    assert found["partition"] == {"test": [[[0]]]}
