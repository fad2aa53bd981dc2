"""The command line: ``quickmerge COMMAND``. Capabilities bring their commands; here they are put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quickmerge.console.commands import add, choice
from quickmerge.console.ending import Ending, end
from quickmerge.console.recording import record_by


class _Commands(TyperGroup):
    """The commands of the program, in the order of their help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """What most come for first."""
        order = ("generate", "bench", "show", "train")
        return sorted(super().list_commands(ctx), key=lambda name: order.index(name) if name in order else len(order))


app = typer.Typer(
    name="quickmerge",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        from quickmerge.cli.versions import versions

        print(versions())
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error was raised, too; or set QUICKMERGE_DEBUG=1.")
    ] = False,
) -> None:
    """Make transformers predict with fewer tokens, and see what it cost."""
    Ending.debug = debug


def _register() -> None:
    from quickmerge.calm import cli as calm
    from quickmerge.cli import bench as texts
    from quickmerge.cli import generate, ls, push, tasks, train
    from quickmerge.merge.cli import bench, demo, plan, show
    from quickmerge.recipe import cli as recipe
    from quickmerge.recipe import cli_calibrate as floors
    from quickmerge.recipe.options import record_ingredients
    from quickmerge.recognition import cli as recognition
    from quickmerge.serve import cli as serve
    from quickmerge.serve.batch import cli as batch
    from quickmerge.serve.studio import cli as studio
    from quickmerge.speculative import cli as speculative
    from quickmerge.speculative.gumiho import cli_export as export
    from quickmerge.transplant import cli as transplant

    record_by(record_ingredients)

    add(app, "demo", demo.demo, demo.EXAMPLE)

    writes = choice("generate", "text", image="image")
    add(writes, "text", generate.text, generate.TEXT_EXAMPLE)
    add(writes, "image", generate.image, generate.IMAGE_EXAMPLE)
    add(writes, "calm", calm.generate, calm.GENERATE_EXAMPLE)
    app.add_typer(writes, help="Answer a prompt about a document or about images, which are read with fewer tokens.")

    measures = choice("bench", "text", image="image", drafter="decode")
    add(measures, "text", texts.text, texts.TEXT_EXAMPLE)
    add(measures, "tasks", tasks.tasks, tasks.EXAMPLE)
    add(measures, "image", bench.image, bench.IMAGE_EXAMPLE)
    add(measures, "vlm", bench.vlm, bench.VLM_EXAMPLE)
    add(measures, "decode", speculative.decode, speculative.DECODE_EXAMPLE)
    add(measures, "calm", calm.bench, calm.BENCH_EXAMPLE)
    app.add_typer(measures, help="Quality and cost of several methods on your documents or images, timed in turns.")

    shows = choice("show", "text", image="image", video="video")
    add(shows, "text", show.text, show.TEXT_EXAMPLE)
    add(shows, "image", show.image, show.IMAGE_EXAMPLE)
    add(shows, "video", show.video, show.VIDEO_EXAMPLE)
    app.add_typer(shows, help="What of a text, an image or a video was kept, and what was merged into what.")

    tells = choice("recipe", "show")
    add(tells, "show", recipe.show, recipe.SHOW_EXAMPLE)
    add(tells, "check", recipe.check, recipe.CHECK_EXAMPLE)
    app.add_typer(tells, help="What a recipe does to a model, and whether it can.")

    exports = choice("export", "eagle")
    add(exports, "eagle", export.eagle, export.EAGLE_EXAMPLE)
    add(exports, "gumiho", export.published, export.PUBLISHED_EXAMPLE)
    app.add_typer(exports, help="Draft heads in the layouts of other programs: EAGLE for vLLM, Gumiho's own.")

    add(app, "calibrate", floors.calibrate, floors.EXAMPLE)
    add(app, "package", serve.package, serve.EXAMPLE)
    add(app, "batch", batch.batch, batch.EXAMPLE)
    add(app, "studio", studio.studio, studio.EXAMPLE)
    add(app, "recognize", recognition.recognize, recognition.EXAMPLE)
    add(app, "transplant", transplant.transplant, transplant.EXAMPLE)
    add(app, "plan", plan.plan, plan.EXAMPLE)
    add(app, "push", push.push, push.EXAMPLE)
    add(app, "ls", ls.ls, ls.EXAMPLE)
    app.add_typer(train.app)


_register()


def main() -> None:
    """Run the command line; anything wrong with what was given is one sentence on stderr and exit code 2."""
    end(lambda: app(prog_name="quickmerge", standalone_mode=False))
