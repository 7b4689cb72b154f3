"""Judge a finished run: its best weights on a split of its data.

    python predict.py runs/NAME                        # the test split
    python predict.py runs/NAME --split validation     # the rows that were held out of training
    accelerate launch predict.py runs/NAME             # with Accelerate's precision and processes, as in training

Prints loss, top-1 and top-5 and writes them to runs/NAME/predictions/SPLIT.json. The normalisation and the image size
are those of the training, read from the run.
"""

import argparse
import dataclasses
from pathlib import Path

import hub
from config import Config, check, read_yaml
from errors import USAGE, UserError, told


def parse() -> tuple[argparse.Namespace, Config]:
    """The command line and the run's configuration; UserError if the folder is no finished run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with best/ and config.yaml")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="rows to judge it on [test]")
    args = parser.parse_args()
    for needed in ("config.yaml", "best/config.json", "best/model.safetensors"):
        if not (args.run / needed).is_file():
            raise UserError(f"{args.run} is not a run with trained weights: it has no {needed}", USAGE)
    path = args.run / "config.yaml"
    config = check(read_yaml(path), str(path))
    # The weights are the run's own: nothing else is wanted from the hub than, perhaps, the data.
    model = dataclasses.replace(config.model, pretrained=False, weights=str(args.run / "best"))
    return args, dataclasses.replace(config, model=model, tracking="none")


if __name__ == "__main__":
    with told():
        ARGS, CONFIG = parse()  # before torch takes its seconds
        hub.check(CONFIG)

import json

import timm

import augment
import data
import launch
import models  # registers the project's own networks with timm  # noqa: F401
from engine import validate


def predict(run: Path, split: str, config: Config) -> dict[str, float]:
    """Loss (nats), top-1 and top-5 (fractions) of a run's best weights on a split, also written to its predictions/."""
    accelerator = launch.make_accelerator(config)
    share, micro_batch_size = launch.share_of_batch(config, accelerator)
    source = data.load(config.data)
    if getattr(source, split) is None:
        raise UserError(f"{run}: its data have no {split} split (data.test_split is null)", USAGE)
    model = launch.in_its_layout(timm.create_model(f"local-dir:{run / 'best'}", pretrained=True), accelerator.device)
    _, transform = augment.build(config, model.pretrained_cfg, accelerator.device)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    rows = accelerator.prepare(data.loader(source, split, config.data, share, config.seed))
    result = validate(accelerator, model, rows, transform, micro_batch_size)
    if accelerator.is_main_process:
        path = run / "predictions" / f"{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    accelerator.print(
        f"{run}, {split}: loss {result['loss']:.4f}, top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}"
    )
    accelerator.end_training()
    return result


if __name__ == "__main__":
    with told():
        predict(ARGS.run, ARGS.split, CONFIG)
