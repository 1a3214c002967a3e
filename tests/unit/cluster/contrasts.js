// Texts of a page, in view or not, whose contrast with what is behind them is below a bound.
(least) => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  // Colours painted one over the other, the last on top.
  const painted = (...colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) {
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const grounds = (element) => {
    const found = [];
    for (let each = element; each; each = each.parentElement) found.unshift(getComputedStyle(each).backgroundColor);
    return found;
  };
  const wrong = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.offsetWidth <= 1) continue;
    const { color } = getComputedStyle(element);
    const below = grounds(element);
    // A number in a bar lies on its parts as well.
    const parts = element.parentElement.matches(".bar") ? [...element.parentElement.querySelectorAll("i")] : [];
    for (const over of [[], ...parts.map((part) => [getComputedStyle(part).backgroundColor])]) {
      const ratio = contrast(painted(...below, ...over, color), painted(...below, ...over));
      if (ratio < least) wrong.add(`${element.tagName}.${element.className} ${element.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
    }
  }
  return [...wrong];
}
