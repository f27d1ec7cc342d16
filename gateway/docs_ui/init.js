"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
paint();
dark.addEventListener("change", paint);
SwaggerUIBundle({
  domNode: document.getElementById("docs"),
  url: "/docs/openapi.json",
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  validatorUrl: null, // its badge is an image of another site, which is told the document's address
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
