// Pictures and videos on their way into a message: picked, dropped or pasted.

import { byId, make } from "../shared/dom.js";

/** Shows what is attached and hands it over. `refuse` is told what is neither a picture nor a video. */
export class Attachments {
  #files = [];
  #list = byId("attachments");

  constructor(refuse) {
    this.refuse = refuse;
    const picker = byId("files");
    byId("attach").addEventListener("click", () => picker.click());
    picker.addEventListener("change", () => {
      this.add(picker.files);
      picker.value = "";
    });
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) {
        event.preventDefault();
        this.add(event.clipboardData.files);
      }
    });
    this.#takeDrops();
  }

  get any() {
    return this.#files.length > 0;
  }

  /** Attaches files, in their order. */
  async add(files) {
    // A copy: the picker's own list empties when it is reset.
    for (const file of [...files]) {
      const kind = ["image", "video"].find((name) => file.type.startsWith(`${name}/`));
      if (kind) {
        this.#files.push({ kind, name: file.name, url: await dataUrl(file) });
        this.#show();
      } else {
        this.refuse(`${file.name} is neither a picture nor a video.`);
      }
    }
  }

  /** What is attached, which then no longer is: [{kind, name, url}]. */
  take() {
    const taken = this.#files;
    this.#files = [];
    this.#show();
    return taken;
  }

  #show() {
    this.#list.replaceChildren(
      ...this.#files.map((file) => {
        const remove = make("button", { type: "button", title: `Remove ${file.name}`, ariaLabel: `Remove ${file.name}` }, "\u00d7");
        remove.addEventListener("click", () => {
          this.#files = this.#files.filter((other) => other !== file);
          this.#show();
        });
        return make("li", {}, shown(file), remove);
      }),
    );
  }

  #takeDrops() {
    let inside = 0;
    const over = (change) => {
      inside = Math.max(0, inside + change);
      document.body.classList.toggle("dropping", inside > 0);
    };
    const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
    window.addEventListener("dragenter", (event) => carriesFiles(event) && over(1));
    window.addEventListener("dragleave", (event) => carriesFiles(event) && over(-1));
    window.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
    window.addEventListener("drop", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      over(-inside);
      this.add(event.dataTransfer.files);
    });
  }
}

/** A picture or a video as people see it. */
export function shown({ kind, name, url }) {
  return kind === "image"
    ? make("img", { src: url, alt: name })
    : make("video", { src: url, controls: true, muted: true, playsInline: true, ariaLabel: name });
}

/** A part of a message, in the form of the API. */
export function part({ kind, url }) {
  return { type: `${kind}_url`, [`${kind}_url`]: { url } };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
