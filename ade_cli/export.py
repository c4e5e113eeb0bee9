"""``ade export RUN OUT``."""

from __future__ import annotations

import argparse

from ade_base.extensions import added, load
from ade_cli.commands import command
from ade_cli.data_options import add_data_arguments, dataset_of_run, say
from ade_cli.help_texts import RUN_OR_BUNDLE
from ade_cli.paths import given_bundle, given_path
from ade_model.checkpoint import read_config
from export.parity import parity_images
from export.write import ExportError, add_graphs, evaluation_of, export_bundle
from serving.engine.bundle import MANIFEST_NAME, check_name, check_path, plain_name
from training.data import DataError
from training.runs import latest_checkpoint, run_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=given_bundle, metavar="RUN", help=RUN_OR_BUNDLE)
    parser.add_argument(
        "out", type=given_path, metavar="OUT", help="the bundle's folder; must not exist"
    )
    parser.add_argument("--name", help="name of the model in answers (default: DATA-RECIPE)")
    parser.add_argument(
        "--licence",
        metavar="TEXT",
        help="licence of the weights, for the manifest (default: none)",
    )
    parser.set_defaults(graphs=[])
    for name, graphs in added("graphs").items():
        parser.add_argument(
            f"--with-{name}",
            action="append_const",
            dest="graphs",
            const=name,
            help=f"add {graphs.line}; from a bundle: copy it with all that it has, and add that "
            "alone, without data",
        )
    add_data_arguments(parser, required=False)


def run(args: argparse.Namespace) -> None:
    if args.graphs and (args.run / MANIFEST_NAME).is_file():
        if args.name or args.licence or args.data or args.root:
            raise ExportError(
                f"--with-{args.graphs[0]} copies a bundle with all that it has: leave out --name, "
                "--licence, --data and --root"
            )
        add_graphs(args.run, args.out, args.graphs, ExportError)
        following = command(*added("graphs")[args.graphs[-1]].following, args.out)
        say(f"wrote {args.out}; next: {following}")
        return
    folder = latest_checkpoint(args.run)
    config = read_config(folder)
    # Checked here too, because reading the images may take long.
    check_path(args.out)
    if args.out.exists():
        raise ExportError(f"{args.out} exists: export to a new folder")
    if args.name:
        check_name(args.name)
    for name in args.graphs:
        load(added("graphs")[name].check)(config)
    dataset = dataset_of_run(args, run_of(folder), config["model"]["image_size"])
    images = parity_images(dataset)
    if len(images) < 2:
        raise DataError(f"{dataset.name} has {len(images)} images; parity needs at least 2")
    bundle_name = args.name or plain_name(f"{dataset.name}-{config['recipe']}")
    export_bundle(
        folder,
        args.out,
        bundle_name,
        images,
        evaluation_of(folder),
        report=say,
        licence=args.licence,
        further=args.graphs,
        dataset=dataset,
    )
    say(f"wrote {args.out}; next: {command('calibrate', args.out, 'OUT', '--data', '...')}")
