// Questions to begin with, about pictures the small built-in model can read.

import { byId, make } from "../shared/dom.js";

const EXAMPLES = [
  { file: "picture.png", question: "What colour is the star?", note: "A picture" },
  { file: "clip.mp4", question: "When does the square turn red?", note: "A clip" },
  { file: "thought.png", question: "Is the orange star left or right of the green cross?", note: "With thinking", thinking: "on" },
  { file: "number.png", question: "What number is in the picture?", note: "Looking closer", zoom: true },
  { file: "thought.png", question: "Give the box of the square as JSON.", note: "Boxes" },
  { file: "http.png", question: "How many shapes are there?", note: "Counting" },
];
const TYPES = { png: "image/png", mp4: "video/mp4" };

/** Lists them; `ask` is called with the chosen one: {question, thinking, zoom, file}, file being a File. */
export function listExamples(ask) {
  byId("examples").append(
    ...EXAMPLES.map((example) => {
      const source = `samples/${example.file}`;
      const preview = example.file.endsWith(".mp4")
        ? make("video", { src: source, muted: true, loop: true, autoplay: !stillWanted(), playsInline: true })
        : make("img", { src: source, alt: "" });
      const button = make("button", { type: "button" }, preview, make("span", {}, example.question), make("small", {}, example.note));
      button.addEventListener("click", async () => {
        const content = await (await fetch(source)).blob();
        const file = new File([content], example.file, { type: TYPES[example.file.split(".").pop()] });
        ask({ thinking: "off", ...example, file });
      });
      return make("li", {}, button);
    }),
  );
}

const stillWanted = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
