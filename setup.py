"""What pyproject.toml cannot say: a wheel carries train.py and configs/, which stand beside the packages here."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = [Path("train.py"), *sorted(Path("configs").rglob("*.yaml"))]


class BuildPy(build_py):
    """Copies them to where distrib/root.py looks. An editable install takes nothing from what is built here."""

    def run(self) -> None:
        """Builds the packages, then adds the copies."""
        super().run()
        for file in CARRIED:
            target = Path(self.build_lib, "distrib", "carried", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution holds: these, too."""
        return [*super().get_source_files(), *map(str, CARRIED)]


setup(cmdclass={"build_py": BuildPy})
