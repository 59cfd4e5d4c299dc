"""The overview for whoever runs the project: what was done, how far people agree, how the reward model follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import HTMLResponse, StreamingResponse

from nemo_rlhf.feedback.exchange import export_records
from nemo_rlhf.feedback.web.figures import NUM_DAYS, figures
from nemo_rlhf.feedback.web.security import check_form
from nemo_rlhf.feedback.web.site import Admin, Here, Site

router = APIRouter()


@router.get("/admin")
def overview(request: Request, here: Here, account: Admin) -> HTMLResponse:
    return here.page(
        request,
        "admin.html",
        view="admin",
        account=account,
        figures=figures(here.store, here.run_id),
        num_days=NUM_DAYS,
    )


@router.post("/export", dependencies=[Depends(check_form)])
def export(
    here: Here, account: Admin, form: Annotated[Literal["pairs", "conversational"], Form()] = "pairs"
) -> StreamingResponse:
    """All pairs as they stand, a file to keep."""
    return StreamingResponse(
        _lines(here, form),
        media_type="application/jsonl",
        headers={"Content-Disposition": f'attachment; filename="{form}.jsonl"'},
    )


def _lines(here: Site, form: str) -> Iterator[str]:
    for record in export_records(here.store, here.run_id, form):
        yield json.dumps(record) + "\n"
