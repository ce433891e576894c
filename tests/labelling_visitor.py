"""Somebody at the labelling page without a browser: follows links, fills in forms, reads what is shown."""

from __future__ import annotations

import re

import lxml.html
from starlette.testclient import TestClient

from rlhf_gym.feedback import FeedbackStore, Item
from rlhf_gym.feedback.page import Labelling, PageSettings, make_app

SECRET = bytes(32)
HOST = "http://localhost:8642"
SKY = Item("The sky is", (" blue.", " green."), id="sky")
SEA = Item("The sea is", (" wide.", " dry."), id="sea")
GRASS = Item("The grass is", (" green.", " red."), id="grass")
ONE = Item("The sun is", (" hot.",), id="sun")


def app_of(path, *items, token=None, **settings):
    """A labelling and its application."""
    labelling = Labelling(FeedbackStore(path), PageSettings(**{"gold_rate": 0.0, **settings}), items or None)
    return labelling, make_app(labelling, secret=SECRET, hosts=["localhost", "127.0.0.1"], token=token)


class Visitor:
    """One browser window. ``page`` is what it shows."""

    def __init__(self, app, name=None, **more):
        self.client = TestClient(app, base_url=HOST, **more)
        self.page = None
        if name is not None:
            self.get("/")
            self.send("/sign-in", name=name)

    def get(self, path, **more):
        return self._show(self.client.get(path, **more))

    def form(self, action):
        """The fields of a form as it is shown."""
        (form,) = [form for form in self.page.forms if form.action == action]
        return {name: value.replace("\n", "\r\n") for name, value in form.form_values()}

    def send(self, action, *, headers=None, without=(), **fields):
        """Fill in and send a form."""
        names = {name.replace("_", "-"): value for name, value in fields.items()}
        values = {name: value for name, value in (self.form(action) | names).items() if name not in without}
        return self._show(self.client.post(action, data=values, headers=headers))

    def answer(self, verdict, **fields):
        return self.send("/answer", verdict=verdict, **fields)

    def undo(self):
        return self.send("/undo")

    def shown(self):
        """The texts of the responses from left to right."""
        return [div.text_content() for div in self.select(".response > .text")]

    def texts(self, selector):
        return [" ".join(element.text_content().split()) for element in self.select(selector)]

    def select(self, selector):
        """Elements by tags, classes and ids, with blanks and ">" between them."""
        return [element for each in selector.split(", ") for element in self.page.xpath(as_xpath(each))]

    def _show(self, response):
        if response.headers.get("content-type", "").startswith("text/html"):
            # As HTML5 has it, and libxml2 not: the line break after the tag does not belong to the text.
            self.page = lxml.html.fromstring(re.sub(r"(<textarea[^>]*>)\n", r"\1", response.text))
        return response


def as_xpath(selector):
    path, axis = "", "//"
    for part in selector.split():
        if part == ">":
            axis = "/"
            continue
        tag, kind, name = re.fullmatch(r"(\w*)(?:([.#])([\w-]+))?", part).groups()
        path += axis + (tag or "*")
        path += {".": f"[contains(concat(' ', @class, ' '), ' {name} ')]", "#": f"[@id='{name}']", None: ""}[kind]
        axis = "//"
    return path
