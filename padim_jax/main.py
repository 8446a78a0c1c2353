"""PaDiM: fits one Gaussian per image patch to normal images and finds what deviates.

Modes:
  train_and_eval  fit, save, evaluate (the default)
  train           fit and save
  eval            evaluate a saved model
  predict         score images without labels: --input=IMAGE, FOLDER or 'GLOB'; with --watch
                  go on with those that arrive in the FOLDER, and hand results over:
                  --on_result. It and eval take an exported file as well, without JAX:
                  --checkpoint=part.onnx
  calibrate       find thresholds on normal images that were not fitted: --input
  update          extend a saved model by normal images: --input, or the configuration's
  forget          remove images from a saved model that it was fitted to: --input
  merge           join models of disjoint images: --models=A,B --checkpoint=JOINED
  export          write model.safetensors, for scoring alone; half the size with --half;
                  with --format=onnx or stablehlo for other runtimes

Examples:
  python -m padim_jax.main --config=configs/demo.py
  python -m padim_jax.main --config=configs/mvtec.py --config.category=bottle
  python -m padim_jax.main --config=configs/mvtec.py --config.category=all
  python -m padim_jax.main --config=configs/mvtec.py:seed --config.model.channels=448
  python -m padim_jax.main --config=configs/folder.py --config.dataset.root=/path/to/parts
  python -m padim_jax.main --mode=eval --workdir=results/mvtec_ad_bottle
  python -m padim_jax.main --mode=predict --workdir=results/mvtec_ad_bottle --input=parts/

`padim-jax` is the same as `python -m padim_jax.main`. Every setting of --config can be
overridden, as in --config.batch_size=16; without --config, those of a saved model.
padim_jax/config/settings.py explains them all.
Results go to --workdir. Exit codes: 0 done, 1 a bug or a failing machine, 2 something
to mend in the command, the settings, the files or the limits of memory, 130 interrupted
(Ctrl-C).
"""

import sys

if sys.platform == "win32":
    # Before imports of modules that only POSIX systems have.
    print("error: padim_jax runs on Linux and macOS, not on Windows; use WSL2", file=sys.stderr)
    sys.exit(2)

from padim_jax.system import interrupts, streams

if __name__ == "__main__":
    streams.install()
    interrupts.install()  # first, since the imports take their time

import atexit
import gc
import os
from collections.abc import Sequence

# XLA runs small factorisations in parallel already; the threads of OpenBLAS, which it
# calls for each, would fight for the same cores (measured with three cores busy: 10 to
# 25 times slower). To be set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import app

from padim_jax.errors import NO_MEMORY, Stopped, UserError, is_out_of_memory
from padim_jax.runs import flags, modes
from padim_jax.system import ending, paths


def main(argv: Sequence[str]) -> None:
    """Check the command, join other processes, and run its mode.

    Args:
      argv: the program's name, then overrides of a stored model's settings.

    Raises:
      UserError: something to mend in the command, the settings or the files.
      Stopped: by SIGTERM, during a fit that is saved.
    """
    command = flags.command(argv[1:])
    if modes.scores_without_jax(command.arguments["checkpoint"]):
        flags.require_one_process(command.place)
        with paths.explained():
            modes.run(command.mode, **command.arguments)
        return
    # Only now what takes long to import: a mistake should not have to wait for it.
    flags.import_jax()
    from padim_jax.devices import distributed

    place = distributed.arguments(*command.place, os.environ)
    with (
        distributed.session(place, command.settings, command.join_seconds),
        paths.explained(),
    ):
        modes.run(command.mode, **command.arguments)


def _main(argv: Sequence[str]) -> None:
    ending.show_warnings(flags.STRICT.value)
    try:
        main(argv)
    except UserError as error:
        ending.fail(str(error))
    except Stopped as stop:
        print(stop)
        sys.exit(flags.STOPPED_CODE.value)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ending.fail(NO_MEMORY)


def run() -> None:
    """The console script `padim-jax`."""
    streams.install()
    interrupts.install()
    # A last search for garbage, in all that was imported, takes up to half a second.
    atexit.register(gc.freeze)
    app.run(_main, flags_parser=lambda argv: flags.parse(argv, __doc__))


if __name__ == "__main__":
    run()
