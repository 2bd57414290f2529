"""Messages of long operations: shown as plain lines, and only by programs that ask for it."""

import logging
import subprocess
import sys

import pytest

from glide_ray import progress


@pytest.fixture(autouse=True)
def logger():
    logger = logging.getLogger("glide_ray")
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers, logger.level = handlers, level


def test_a_library_user_sees_no_messages_and_a_warning_once():
    script = (
        "import logging; log = logging.getLogger('glide_ray.data.emoji'); "
        "log.info('rendering'); log.warning('no upsampler')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and done.stderr == "no upsampler\n"


def test_messages_are_plain_lines_and_warnings_name_the_program(logger, capsys):
    progress.show_messages()
    progress.show_messages()  # a second call does not double the lines
    logger.getChild("data.emoji").info("rendering 1,000 pictures, 50% done")
    logger.getChild("pretrained").warning("no upsampler was given")
    logger.getChild("data").debug("detail")
    assert tuple(capsys.readouterr()) == (
        "rendering 1,000 pictures, 50% done\n",
        "glide: no upsampler was given\n",
    )


def test_messages_leave_standard_output_to_data_if_asked(logger, capsys):
    progress.show_messages(to_stderr=True)
    logger.info("measuring")
    assert tuple(capsys.readouterr()) == ("", "measuring\n")


def test_messages_of_a_stage_are_indented_also_after_an_error(logger, capsys):
    progress.show_messages()
    with pytest.raises(ValueError), progress.indented():
        logger.info("part of it")
        raise ValueError
    logger.info("next")
    assert capsys.readouterr().out == "  part of it\nnext\n"
