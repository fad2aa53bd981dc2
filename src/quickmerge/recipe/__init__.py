"""What is done to a model, as one object that can be applied, saved, told and compared.

`Recipe` has a place for each ingredient: merging of the text, of visual tokens and in a vision tower, multipole
attention, and speculative decoding. This room alone knows all of these capabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.recipe.calibration import Calibration as Calibration
    from quickmerge.recipe.calibration import calibrate as calibrate
    from quickmerge.recipe.measured import Measured as Measured
    from quickmerge.recipe.measured import PaysFrom as PaysFrom
    from quickmerge.recipe.pays import MeasuredRecipe as MeasuredRecipe
    from quickmerge.recipe.pays import break_even as break_even
    from quickmerge.recipe.reading import Reading as Reading
    from quickmerge.recipe.reading import read as read
    from quickmerge.recipe.recipe import Recipe as Recipe
    from quickmerge.recipe.recipe import apply as apply
    from quickmerge.recipe.run import RecipeRun as RecipeRun
    from quickmerge.recipe.run import RecipeStats as RecipeStats
    from quickmerge.recipe.speculation import Speculation as Speculation
    from quickmerge.recipe.tell import Told as Told

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "calibration": ("Calibration", "calibrate"),
        "measured": ("Measured", "PaysFrom"),
        "pays": ("MeasuredRecipe", "break_even"),
        "reading": ("Reading", "read"),
        "recipe": ("Recipe", "apply"),
        "run": ("RecipeRun", "RecipeStats"),
        "speculation": ("Speculation",),
        "tell": ("Told",),
    },
)
