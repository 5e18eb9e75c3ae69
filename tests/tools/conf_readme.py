"""Write conf/README.md from the comments of the config files: python tests/tools/conf_readme.py"""

import re
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
INTRO = """# Configuration

Every component is a [Hydra](https://hydra.cc) config group: a folder here, with one file per option.

```sh
python train.py net=tiny sampler=ddim sampler.eta=0.5   # two options and a value
python train.py net=tiny --cfg job                      # print the composed config, with every parameter
python train.py --help                                  # list the groups of train.py's defaults, their options and keys
```

An option's file has its description in its first comment, and the parameters of its `_target_`. What options share
is in a base file, which they name in their `defaults` list: another option, or a file `_name.yaml`, which is no option
itself and is not listed. A test (`tests/test_conf.py`) checks that the composed config of every option has every
parameter with a default.

This page is generated from the files by `python tests/tools/conf_readme.py`.
"""
SCRIPTS = ("train", "sample")
NESTED = {  # groups of which the options of `training` choose one: their comments
    "ema": "The average of the weights: `ema@training.ema=` chooses that of the model, "
    "`ema@first_stage.ema=` that of its first stage",
}


def description(path: Path) -> str:
    """Return the first comment line of a config file after the package header. Raises ValueError without one."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.removeprefix("#").strip()
    raise ValueError(f"{path}: expected a comment that describes the option before its first key")


def groups() -> dict[str, tuple[str, dict[str, str]]]:
    """Map each group to its comment in a script's defaults list and to the default option of each script that has it.

    An option of training that has the group counts as a script.
    """
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for script in SCRIPTS:
        text = (CONF / f"{script}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
        for group, option, comment in re.findall(r"^  - (\w+): (\w+) *(?:# *(.*))?$", text, re.MULTILINE):
            if group != "experiments":
                comment = found[group][0] if group in found else comment
                found[group] = comment, {**found.get(group, ("", {}))[1], f"{script}.py": option}
        if script == "train":
            found |= nested()
    return found


def nested() -> dict[str, tuple[str, dict[str, str]]]:
    """Map each group of NESTED to its comment and the default option of each option of training."""
    found: dict[str, tuple[str, dict[str, str]]] = {group: (comment, {}) for group, comment in NESTED.items()}
    for path in sorted((CONF / "training").glob("*.yaml")):
        for group, option in re.findall(r"/(\w+)@\1: (\w+)", path.read_text(encoding="utf-8")):
            found[group][1][f"training={path.stem}"] = option
    return found


def natural(path: Path) -> list[str]:
    """Return a sort key that puts f2 before f16."""
    return [part.zfill(8) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]


def table(group: str) -> str:
    """Return the Markdown table of a group's options."""
    rows = ["| option | |", "|---|---|"]
    for path in sorted((CONF / group).glob("*.yaml"), key=natural):
        if not path.stem.startswith("_"):
            rows.append(f"| `{path.stem}` | {description(path).replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def readme() -> str:
    """Return the text of conf/README.md."""
    parts, links = [], []
    for group, (comment, defaults) in groups().items():
        default = ", ".join(f"`{option}` in `{script}`" for script, option in defaults.items() if option != "null")
        links.append(f"[{group}](#{group})")
        parts.append(f"## {group}\n\n{comment}. Default: {default or 'none'}.\n\n{table(group)}\n")
    return "\n".join([INTRO, f"Groups: {', '.join(links)}.\n", *parts])


if __name__ == "__main__":
    (CONF / "README.md").write_text(readme(), encoding="utf-8")
