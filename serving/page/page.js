// What Gradio does not do by itself, in the page's head. `serving.page.theme` defines
// IMAGE_SUFFIXES, the endings of files that the page takes as images.

// Says what Gradio does not: to screen readers names of examples and of pairs of images, which
// accordions are open, and results that change; to everybody that an image cannot be shown.
const span_of = (handle) => {  // of the images, which may be narrower than their frame
  const frame = handle.parentElement.getBoundingClientRect();
  const { naturalWidth, naturalHeight } = handle.parentElement.querySelector("img");
  const width = Math.min(frame.width, (frame.height * naturalWidth) / naturalHeight);
  return [frame.x + (frame.width - width) / 2, width];
};
const name_pair = (handle) => {
  const pair = handle.closest(".ade-pair");
  const label = pair.querySelector('[data-testid="block-label"]').textContent.trim();
  const names = label.split(" and ");
  pair.querySelectorAll(".content img").forEach((image, i) => { image.alt = names[i]; });
  const [left, width] = span_of(handle);
  const own = handle.getBoundingClientRect();
  const share = (own.x + own.width / 2 - left) / width;
  if (!isFinite(share)) return;  // it is hidden, or no image is loaded yet
  Object.assign(handle, { tabIndex: 0, role: "slider", ariaLabel: `Divider: ${label}` });
  handle.ariaValueNow = Math.round(100 * Math.min(Math.max(share, 0), 1));
};
const name_parts = () => {
  for (const image of document.querySelectorAll('.ade-examples button img[alt=""]'))
    image.alt = "example " + image.src.split("/").pop().split(".")[0];
  for (const fold of document.querySelectorAll("button.label-wrap"))
    fold.setAttribute("aria-expanded", fold.nextElementSibling?.style.display !== "none");
  // Not the results themselves: only what is there before them announces its changes. Nor the
  // block around, which shows the time that a run takes.
  for (const node of document.querySelectorAll(".ade-live:not(.block)")) node.ariaLive = "polite";
  document.querySelectorAll('.ade-pair [data-testid="slider"]').forEach(name_pair);
};
new MutationObserver(name_parts).observe(
  document.documentElement, { childList: true, subtree: true });
for (const event of ["click", "load", "pointerup"])
  document.addEventListener(event, () => setTimeout(name_parts), { capture: true });
for (const [event, failed] of [["error", true], ["load", false]])
  document.addEventListener(event, ({ target }) => {
    if (target.tagName === "IMG")
      target.closest(".ade-pixels")?.classList.toggle("ade-unshown", failed);
  }, { capture: true });

// By itself, Gradio's upload icon only removes the image.
document.addEventListener("click", (event) => {
  const icon = event.target.closest('[data-testid="source-select"] [aria-label="Upload file"]');
  if (!icon) return;
  const open = () => icon.closest(".image-container").querySelector("input[type=file]")?.click();
  if (icon.classList.contains("selected")) {
    event.stopPropagation();  // the image stays until a file is chosen
    open();
  } else setTimeout(open);  // Gradio leaves the webcam or the clipboard first
}, { capture: true });

// When an image arrives, Gradio replaces the file input, and would lose what a dialog chooses then.
document.addEventListener("click", ({ target: input }) => {
  if (input.type !== "file") return;
  const place = input.parentElement;
  input.onchange = () => {
    const present = place.querySelector("input[type=file]");
    if (input.isConnected || !present) return;
    present.files = input.files;
    present.dispatchEvent(new Event("change"));
  };
}, { capture: true });

// A folder holds other files, too. The page would skip them, but a large one, or a thousand of them
// in a row, would have the upload refused.
document.addEventListener("change", ({ target: input }) => {
  if (!input.webkitdirectory) return;
  const name = new RegExp(`^(?!\\._).+\\.(${IMAGE_SUFFIXES.join("|")})$`, "i");
  const images = [...input.files].filter((file) => name.test(file.name));
  if (!images.length) return;  // the refusal says what the page takes
  const kept = new DataTransfer();
  for (const image of images) kept.items.add(image);
  input.files = kept.files;
}, { capture: true });

// Gradio takes every touch of a pair of images and every turn of the wheel over it, so that the page
// could not be scrolled there. Two fingers, or Ctrl with the wheel, still zoom.
for (const name of ["touchstart", "wheel"])
  document.addEventListener(name, (event) => {
    const image = event.target.closest(".ade-pair .content")?.querySelector("img");
    const zooms = event.ctrlKey || event.touches?.length > 1;
    if (image?.style.transform.endsWith("scale(1)") && !zooms) event.stopPropagation();
  }, { capture: true, passive: true });

// Gradio moves the handle between a pair of images only by mouse and touch.
document.addEventListener("keydown", (event) => {
  const handle = event.target.closest('.ade-pair [role="slider"]');
  const steps = { ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, Home: -100, End: 100 };
  if (!handle || !(event.key in steps) || event.altKey || event.metaKey) return;
  event.preventDefault();  // scrolling
  const to = Math.min(Math.max(Number(handle.ariaValueNow) + steps[event.key], 0), 100);
  const [left, width] = span_of(handle);
  const mouse = { view: window, clientX: left + (width * to) / 100 };
  handle.dispatchEvent(new MouseEvent("mousedown", mouse));
  window.dispatchEvent(new MouseEvent("mouseup", mouse));
  handle.ariaValueNow = to;  // at once: the next key may follow before Gradio moves it
  setTimeout(name_parts, 100);  // a click or a load may have read the former place meanwhile
});
