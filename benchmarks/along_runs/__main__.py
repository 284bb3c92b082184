"""How far can a method's hypergradient be trusted, from the first outer update of a run to the last?

    python -m benchmarks.along_runs --out out/along-runs
    python -m benchmarks.along_runs --configs known_worth --methods jtds --seeds 3 --out out/along-runs

A method trains with three Neumann terms and its own outer optimiser. At several moments of the run its hypergradient
is taken again, at the same params and weights, by other estimators and on the batches of several draws: nothing of that
touches the run. The exact ones are solves with the batch's Hessian (MINRES) and with its Gauss-Newton matrix (conjugate
gradients), 0.01 added to the diagonal of both, that go on until their residual is 1e-4 or for 300 steps.

For every estimator the table gives the cosine with either exact one on the same batches, median and the worst tenth;
the share of outer variables with the wrong sign, among those whose exact derivative (Gauss-Newton's where there is one)
is larger on average over draws than its standard deviation between them; where it is known which tasks help, how well
it tells them, the mean area under the curve (0.5 is chance); the relative residual; matrix-vector products; and the
time of an outer update over that with three Neumann terms, in turns after the run. Rows that are in DIR/rows.jsonl are
not repeated.
"""

import json

from benchmarks.along_runs import report
from benchmarks.along_runs.measuring import measure
from benchmarks.shared.options import known_names, moments_up_to
from benchmarks.shared.paths import home_path
from experiments import cli

CONFIGS = ("known_worth", "digits_noise")
METHODS = ("jtds", "auxilearn", "maoal", "n_jtds", "auxinash")
MOMENTS = (5, 20, 50, 100, 200, 500)  # outer updates
DRAWS = 8
WITHOUT = {("known_worth", "n_jtds")}  # its batches have two pools, a table has one


def main(argv=None) -> int:
    """Runs the command line."""
    parser = cli.bare_parser("python -m benchmarks.along_runs", __doc__)
    parser.add_argument("--configs", default=",".join(CONFIGS), metavar="C,C", help="default: both")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,M,...", help="default: all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many seeds (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="S", help="the first of them (default 0)")
    parser.add_argument("--updates", type=int, default=MOMENTS[-1], metavar="N", help="outer updates (default 500)")
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help="batches per moment (default 8)")
    parser.add_argument("--out", required=True, type=home_path, metavar="DIR", help="rows and table")
    options = parser.parse_args(argv)
    chosen = known_names(parser, "--configs", options.configs, CONFIGS)
    methods = known_names(parser, "--methods", options.methods, METHODS)
    if options.draws < 2:
        parser.error(f"--draws {options.draws}: expected at least 2, for the spread between batches")
    moments = moments_up_to(parser, options.updates, MOMENTS)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for config in chosen:
        for method in methods:
            if (config, method) in WITHOUT:
                continue
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                about = {"config": config, "method": method, "seed": seed, "moment": moments[-1]}
                if any(about.items() <= row.items() for row in rows):
                    continue
                new = measure(config, method, seed, moments, options.draws)
                with path.open("a") as stream:
                    stream.writelines(json.dumps(row) + "\n" for row in new)
                rows += new
                parts = [report.table(rows)]
                for config_method in dict.fromkeys((row["config"], row["method"]) for row in rows):
                    parts += [", ".join(config_method) + ", cosine with the exact one, Gauss-Newton\n"]
                    parts += [report.by_moment(rows, *config_method, "cosine, Gauss-Newton")]
                (options.out / "table.md").write_text("\n".join(parts))
                print(f"{config}, {method}, seed {seed}: done", flush=True)
    if rows:
        print(report.table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
