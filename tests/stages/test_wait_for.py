"""`wait_for` ends when the file is there and complete, and keeps what it saw."""

import json
import threading
import time
from pathlib import Path

from polytrope.pipeline.stage import load_stage, stage_context


def test_it_waits_for_the_file_and_commits_its_content(tmp_path: Path) -> None:
    definition = load_stage("polytrope.pipeline.stages.wait_for:wait_for")
    context = stage_context(tmp_path, stage="approval")
    awaited = tmp_path / "approved.json"

    def write_slowly() -> None:
        with awaited.open("w") as file:
            for part in ('{"approved"', ": ", "true}"):
                time.sleep(0.05)
                file.write(part)
                file.flush()

    writer = threading.Thread(target=write_slowly)
    writer.start()
    parameters = definition.parameters_model.model_validate({"path": str(awaited), "interval": 0.2})
    summary = definition.call(context, parameters, {})
    writer.join()
    assert json.loads((context.output / "content" / "approved.json").read_text()) == {"approved": True}
    assert summary == {"files": 1.0, "bytes": 18.0}
    assert json.loads((context.output / "event.json").read_text())["files"][0]["path"] == "approved.json"
