"""`saccade demo`: the tiny model trained with all tokens, with pruning only, and with DualSpeed."""

import argparse

OUTPUT_IS_FOLDER = True
EXAMPLES = """
saccade demo                                  minutes on two cores
saccade demo --output out/demo --full         three seeds, and the parts of the method one by one
saccade demo --steps 60 --scenes 100          a quick look, too short to learn the task
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="out/demo", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="three seeds, longer runs, and the parts of the method")
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: 1, or 3 with --full)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: 2, or 1 on one core)")
    parser.add_argument("--steps", type=int, metavar="N", help="fine-tuning steps, for a shorter or longer run")
    parser.add_argument("--scenes", type=int, metavar="N", help="scenes of the test split to evaluate on")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from saccade.values import check_counts

    # Before the seconds that the imports take.
    check_counts(seeds=args.seeds, jobs=args.jobs, steps=args.steps, scenes=args.scenes)
    from saccade.demo.run import FULL, SHORT, run_demo

    settings = FULL if args.full else SHORT
    if args.steps is not None:
        settings = settings.shrink(args.steps)
    if args.scenes is not None:
        settings = replace(settings, test_scenes=args.scenes)
    run_demo(args.output, full=args.full, seeds=args.seeds, settings=settings, jobs=args.jobs)
    return 0
