"""An application that comes up at once, or never; replicas import it."""

from pydantic import BaseModel
from ray import serve
from ray.serve import Application


class Args(BaseModel, extra="forbid"):
    says: str = "hello"
    breaks: bool = False


class Saying:
    def __init__(self, says: str, breaks: bool) -> None:
        if breaks:
            raise ValueError("this one never comes up")
        self.says = says

    async def __call__(self, _request: object) -> str:
        return self.says


def app(args: Args) -> Application:
    return serve.deployment(name="Saying")(Saying).bind(args.says, args.breaks)
